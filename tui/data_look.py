"""One look at a recipe's data: what the files hold, what the tokenizer makes of it, and examples token by token."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..planner.errors import DataError
from .format import count

if TYPE_CHECKING:
    from ..engine.data.preview import Sample, SourceSurvey, Survey
    from ..engine.data.report import Report
    from ..planner.recipe import Recipe

#: Rows of each source that are tokenised and counted unless more are asked for.
ROWS = 2000


@dataclass(frozen=True)
class DataLook:
    """``report`` is None and there are no ``samples`` where there is no tokenizer; ``notes`` say why, and what else
    was decided."""

    survey: Survey
    report: Report | None = None
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()


def look_at(recipe: Recipe, samples: int, rows: int = ROWS) -> DataLook:
    """Look at a recipe's data as training will: with its model's tokenizer, template, and planned length.

    Raises:
        DataError: the recipe names no data, or none that can be used.
        ModelError, HubError: the tokenizer can't be had.
    """
    from ..engine.data.preview import survey
    from ..engine.planning import plan_for

    if not recipe.data:
        raise DataError("the recipe names no data", where="data", do="Add 'data: rows.jsonl', or give --data.")
    seen = recipe.model_copy(update={"data": [s.model_copy(update={"on_bad_row": "skip"}) for s in recipe.data]})
    found = survey(seen)  # all bad rows are counted, whatever the recipe does about them: they are what one looks for
    if find_spec("transformers") is None:
        return DataLook(found, notes=("Install finetui[train] to see single tokens; these counts are estimates.",))
    from ..engine.data.prepared import DataSettings
    from ..engine.data.preview import preview
    from ..engine.data.report import look
    from ..engine.models.load import load_tokenizer, locate

    resolved = plan_for(seen).resolved
    settings = DataSettings(
        resolved.sequence_length, train_on=resolved.train_on, seed=resolved.seed, method=resolved.method
    )
    tokenizer, notes = load_tokenizer(locate(recipe.model), recipe.chat_template, recipe.tuning.new_tokens)
    report = look(recipe, tokenizer, settings, rows, found.train_rows)
    shown = preview(seen, tokenizer, samples, settings) if samples and report.examples else []
    return DataLook(found, report, tuple(shown), tuple(notes))


def source_facts(source: SourceSurvey) -> str:
    """One source in words."""
    about = "" if source.rows_exact else "about "
    rows = "rows unknown" if source.rows is None else f"{about}{source.rows:,} rows"
    sure = f", {source.confidence:.0%} sure" if source.confidence else ""
    return f"{source.format or 'format unknown'}{sure}, {rows}, {source.split}: {source.why}"


def report_facts(report: Report) -> list[tuple[str, str]]:
    """A report in words: label and text, one per line."""
    which = "all" if report.whole else "the first"
    out = report.dropped + report.overlong
    lost = f", {report.truncated:,} cut, {out:,} left out" if report.truncated or out else ""
    cut = f"; {report.cut_tokens:,} beyond {report.sequence_length:,} are cut" if report.cut_tokens else ""
    lengths = f"mean {report.mean:,.0f}, median {report.median:,}, 95% up to {report.p95:,}, longest {report.longest:,}"
    facts = [
        ("tokenised", f"{which} {report.rows:,} rows: {report.examples:,} examples{lost}"),
        ("tokens", f"{report.tokens:,}, of which {report.trained_share:.1%} trained{cut}"),
        ("lengths", lengths),
    ]
    if report.planned_tokens is not None:
        facts.append(("the run", f"will process {count(report.planned_tokens)} tokens, padding aside"))
    if report.chosen_mean is not None:
        facts.append(("answers", f"chosen {report.chosen_mean:,.0f} tokens, rejected {report.rejected_mean:,.0f}"))
    if report.good_share is not None:
        facts.append(("answers", f"{report.good_share:.0%} good"))
    if report.scripts:
        facts.append(("scripts", ", ".join(f"{name} {share:.1%}" for name, share in report.scripts.items())))
    facts.append(("duplicates", f"{report.repeated:,}"))
    return facts


def troubles(report: Report) -> list[str]:
    """What is wrong, in words: warnings, then rows that can't be used."""
    found = list(report.warnings)
    for problem in report.problems:
        times = "1 row" if problem.count == 1 else f"{problem.count:,} rows"
        found.append(f"{times}: {problem.what} (first: {problem.where}). {problem.do}")
    return found
