"""From a recipe's sources to tokenised, split, packed rows on disk, made once and read by every rank and every resume.

The result lies in ``cache_dir/<key>/``; the key is a hash of everything it depends on. It is written beside and renamed
when whole, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.errors import DataError
from ...planner.recipe import Recipe
from . import cache
from .encode import COLUMNS, KINDS, Encoder, Kind, Tally
from .examples import Record
from .formats import open_source
from .holdout import choose, times
from .packing import pack
from .prepared import DataSettings, Facts, Prepared, load
from .prompts import unjudged, write_prompts
from .readers import to_records
from .refuse import Refused
from .skeleton import Mismatch
from .sources import splits_told
from .tokens import Encoded

if TYPE_CHECKING:
    from ...planner.datasource import DataSource

#: How many rows are tokenised in one call.
_BATCH = 512

Progress = Callable[[int], None]


def prepare(
    recipe: Recipe, settings: DataSettings, tokenizer: Any, cache_dir: str | Path, progress: Progress | None = None
) -> Prepared:
    """Read, tokenise, split and pack a recipe's data, or find it done in ``cache_dir``.

    Args:
        recipe: its ``data`` and ``evaluation`` count.
        settings: what the plan decided.
        tokenizer: as :func:`~finetui.engine.data.template.prepare_tokenizer` leaves it.
        cache_dir: a folder that is made if need be.
        progress: called with the number of examples read so far.

    Raises:
        DataError: a source or a row is wrong, or no token at all is trained.
        HubError, MissingExtraError: as :func:`~finetui.engine.data.sources.read_rows`.
    """
    if not recipe.data:
        raise DataError("the recipe names no data", where="data", do="Add a line 'data: rows.jsonl'.")
    settings = settings.of(recipe)
    path = Path(cache_dir) / cache.key(tokenizer, recipe.data, asdict(settings), recipe.evaluation.holdout)
    if path.is_dir():
        try:
            return load(path)
        except (OSError, ValueError, KeyError, TypeError):  # what a power cut has left of it, for one
            shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir():
        with cache.whole_folder(path) as work:
            for fill in (True, False):
                frozen = gc.get_freeze_count()
                gc.freeze()  # else each collection goes through all that the libraries have made since their import
                try:
                    facts = _Build(recipe, settings, tokenizer, work, progress or (lambda _: None), fill).run()
                    break
                except Mismatch:
                    shutil.rmtree(work)
                    work.mkdir()
                finally:
                    if not frozen:  # else a run has set its libraries aside for good
                        gc.unfreeze()
            (work / "facts.json").write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    return load(path)


@dataclass
class _Part:
    """The examples of one split: what they add up to, and where each source begins among them."""

    tally: Tally = field(default_factory=Tally)
    refused: list[Refused] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    trained: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    prompts: list[dict[str, Any]] = field(default_factory=list)
    good: int = 0


class _Build:
    """One tokenisation of a recipe's data into a folder."""

    def __init__(
        self, recipe: Recipe, settings: DataSettings, tokenizer: Any, work: Path, progress: Progress, fill: bool
    ) -> None:
        self.recipe, self.settings, self.work, self.progress = recipe, settings, work, progress
        self.kind: Kind = KINDS[settings.method]
        self.encoder = Encoder(tokenizer, self.kind, settings.sequence_length, settings.train_on, fill)
        embedded = settings.embeddings or embeddings_of(tokenizer)
        # Where all its tokens have an embedding, so have those of every text.
        every = embedded is None or max(tokenizer.get_vocab().values(), default=0) < embedded
        self.embeddings = None if every else embedded
        self.formats: dict[str, str] = {}
        self.read = 0

    def run(self) -> Facts:
        parts = {split: _Part() for split in ("train", "eval")}
        stores: dict[str, Any] = {}
        for split, part in parts.items():
            if self.kind != "asked":
                names, values = COLUMNS[self.kind]
                (self.work / split).mkdir()
                stores[split] = cache.Gathered(self.work / split, names, values)
            for source in (source for source in self.recipe.data if source.split == split):
                part.begins.append(part.tally.examples)
                self._source(source, part, stores.get(split))
            if split in stores:
                stores[split].close()
        self._check(parts["train"])
        facts = self._write(parts, stores)
        for split, store in stores.items():
            store.remove()
            (self.work / split).rmdir()
        self.progress(facts.examples)
        return facts

    # --- reading

    def _source(self, source: DataSource, part: _Part, store: cache.Gathered | None) -> None:
        refused = Refused(source)
        part.refused.append(refused)
        detected, rows = open_source(source, self.settings.method, refused)
        left_out = f"; {told}" if (told := splits_told(source)) else ""
        self.formats[source.path] = f"{detected.format}: {detected.why}{left_out}"
        before, drop = replace(part.tally), source.too_long == "drop"

        def records() -> Iterator[Record]:
            for row in rows:
                try:
                    yield from to_records(row, detected, self.settings.method)
                except DataError as error:
                    refused(error)

        for batch, encoded in self._encoded(records(), refused):
            if self.kind == "learned":
                assert store is not None
                for row in self.encoder.learned(batch, encoded, part.tally, drop=drop):
                    store.learn(row)
                    part.lengths.append(len(row.input_ids))
                    part.trained.append(row.trained)
            elif self.kind == "asked":
                part.prompts += self.encoder.asked(batch, encoded, part.tally)
            else:
                assert store is not None
                for columns in self.encoder.answered(batch, encoded, part.tally, drop=drop):
                    store.add(columns.ids, columns.values)
                    part.good += bool(columns.values.get("label"))
            self.progress(part.tally.examples)
            if source.streaming and self._enough(part.tally, before):
                read = part.tally.examples - before.examples
                steps = f"{self.recipe.max_steps:,} steps"
                self.formats[source.path] += f"; its first {read:,} examples are enough for {steps}"
                break

    def _enough(self, tally: Tally, before: Tally) -> bool:
        """Whether one source alone has given what the run can train on, and what is held out of that."""
        rows, holdout = self.settings.rows, self.recipe.evaluation.holdout
        if rows is None:
            return False
        share = 0.05 if holdout == "auto" else float(holdout)
        rows = math.ceil(rows / (1 - share))
        if self.settings.packing:
            return tally.tokens - before.tokens >= rows * self.settings.sequence_length
        return tally.examples - before.examples >= rows

    def _encoded(
        self, records: Iterator[Record], refused: Refused
    ) -> Iterator[tuple[Sequence[Record], Sequence[Encoded]]]:
        """Batches of records with their tokens. The next texts are made while the tokenizer, which needs no Python,
        works on the last ones."""
        encoder = self.encoder
        with ThreadPoolExecutor(1) as pool:
            waiting: Any = None
            while True:
                batch = self._marked(list(islice(records, _BATCH)), refused)
                begun = batch and (batch, pool.submit(encoder.tokens.raw, [item.text for item in batch[1]]))
                if waiting:
                    (kept, marked), raw = waiting
                    encoded = encoder.tokens.finish(marked, raw.result())
                    self._embedded(kept, encoded)
                    yield kept, encoded
                if not begun:
                    return
                waiting = begun

    def _marked(self, records: list[Record], refused: Refused) -> Any:
        """Records with their texts; None at the end. One that the template refuses is left out, or ends it all."""
        if not records:
            return None
        try:
            return records, self.encoder.marked(records)
        except DataError:
            kept: list[Record] = []
            texts: list[Any] = []
            for record in records:
                try:
                    texts += self.encoder.marked([record])
                    kept.append(record)
                except DataError as error:
                    refused(error)
            return kept, texts

    def _embedded(self, records: Sequence[Record], encoded: Sequence[Encoded]) -> None:
        """Refuse a token that the model has no embedding for: it would end training with an error of the device."""
        if self.embeddings is None or not encoded:
            return
        for index, row in enumerate(encoded):
            if row.input_ids and max(row.input_ids) >= self.embeddings:
                bad = next(token for token in row.input_ids if token >= self.embeddings)
                name = self.encoder.tokenizer.convert_ids_to_tokens(bad)
                what = f"token {name!r} has number {bad}, but the model has embeddings for {self.embeddings} tokens"
                do = "Use the tokenizer that belongs to the model, or resize the model's embeddings."
                raise DataError(what, where=records[index * len(records) // len(encoded)].where, do=do)

    # --- judging

    def _check(self, part: _Part) -> None:
        tally, settings = part.tally, self.settings
        if not tally.examples or (self.kind != "asked" and not tally.trained):
            raise _nothing_trained(part, settings)
        if self.kind == "judged" and part.good in (0, tally.examples):
            what = f"all {tally.examples:,} answers are judged {'good' if part.good else 'bad'}"
            raise DataError(what, where="data", do="KTO learns from the difference: give it answers of both kinds.")

    # --- writing

    def _write(self, parts: dict[str, _Part], stores: dict[str, cache.Gathered]) -> Facts:
        settings, train = self.settings, parts["train"]
        total = train.tally + parts["eval"].tally
        count = train.tally.examples
        if any(source.split == "eval" for source in self.recipe.data):
            kept, out, held = list(range(count)), list(range(parts["eval"].tally.examples)), "eval"
        else:
            out, held = choose(count, self.recipe.evaluation.holdout, settings.seed), "train"
            chosen = set(out)
            kept = [index for index in range(count) if index not in chosen]
        kept = self._weighted(kept, train)
        if not kept:
            what = f"no example is left to train on: of {count:,}, {len(out) if held == 'train' else 0:,} are held out"
            raise DataError(what, where="data", do="Give more rows, raise weight, or lower evaluation.holdout.")
        rows, marks = dict[str, int](), dict[str, str]()
        for name, part, indices in (("train", "train", kept), ("eval", held, out)):
            if self.kind == "asked":
                marks[name] = write_prompts(self.work / f"{name}.arrow", [parts[part].prompts[i] for i in indices])
                rows[name] = len(indices)
                continue
            made: Iterable[list[int]] = ([index] for index in indices)
            rows[name] = len(indices)
            if settings.packing:
                lengths = parts[part].lengths
                packed = pack([lengths[i] for i in indices], settings.sequence_length)
                made, rows[name] = ([indices[i] for i in row] for row in packed), len(packed)
            marks[name] = cache.write_rows(self.work / f"{name}.arrow", stores[part], made, packed=settings.packing)
        tokens, trained = self._sizes(parts["train"], stores.get("train"), kept)
        return Facts(
            examples=total.examples,
            train_examples=len(kept),
            eval_examples=len(out),
            train_rows=rows["train"],
            eval_rows=rows["eval"],
            tokens=total.tokens,
            trained_tokens=total.trained,
            train_tokens=tokens,
            train_trained_tokens=trained,
            truncated=total.truncated,
            cut_tokens=total.cut,
            split=total.split,
            dropped=total.dropped,
            mean_length=round(total.tokens / total.examples, 1),
            max_length=total.longest,
            formats=self.formats,
            warnings=self._warnings(parts, total),
            skipped=sum(refused.count for part in parts.values() for refused in part.refused),
            good=train.good if self.kind == "judged" else None,
            mark=marks["train"],
        )

    def _weighted(self, kept: list[int], part: _Part) -> list[int]:
        """Training examples, each as often as the weight of its source says."""
        sources = [source for source in self.recipe.data if source.split == "train"]
        if all(source.weight == 1.0 for source in sources):
            return kept
        ends = [*part.begins[1:], part.tally.examples]
        spans = zip(part.begins, ends, sources, strict=True)
        return [
            index
            for number, (begin, end, source) in enumerate(spans)
            for index in times([i for i in kept if begin <= i < end], source.weight, self.settings.seed + number)
        ]

    def _sizes(self, part: _Part, store: cache.Gathered | None, kept: list[int]) -> tuple[int, int]:
        """Tokens of the training examples, and those of them with loss."""
        if store is None:
            return sum(len(part.prompts[i]["prompt_ids"]) for i in kept), 0
        if self.kind == "learned":
            return sum(part.lengths[i] for i in kept), sum(part.trained[i] for i in kept)
        sizes = {name: sum(lengths[i] for i in kept) for name, lengths in store.lengths.items()}
        answers = sum(size for name, size in sizes.items() if name != "prompt_ids")
        prompts = sizes.get("prompt_ids", 0) * (len(sizes) - 1)
        return answers + prompts, answers

    def _warnings(self, parts: dict[str, _Part], total: Tally) -> tuple[str, ...]:
        limit = self.settings.sequence_length
        warnings = [text for part in parts.values() for refused in part.refused for text in refused.told()]
        if total.dropped:
            rows = total.examples + total.dropped
            warnings.append(f"{total.dropped} of {rows} rows have no answer within {limit} tokens and are left out")
        if total.overlong:
            rows = total.examples + total.dropped + total.overlong
            warnings.append(f"{total.overlong} of {rows} rows are longer than {limit} tokens and are left out")
        cut = total.truncated - total.dropped
        if cut > 0:
            warnings.append(f"{cut} of {total.examples} rows are longer than {limit} tokens and lose their end")
        warnings += unjudged(self.recipe.rewards, parts["train"].prompts)
        return tuple(warnings)


def embeddings_of(tokenizer: Any) -> int | None:
    """How many tokens the model has an embedding for, as the config.json beside the tokenizer says."""
    path = Path(str(tokenizer.name_or_path)) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _nothing_trained(part: _Part, settings: DataSettings) -> DataError:
    refused = next((item for item in part.refused if item.count), None)
    if refused is not None and not part.tally.dropped:
        return DataError(
            f"every row was refused; the first: {refused.first}", where="data", do="Look at it with 'finetui data'."
        )
    if part.tally.overlong:
        what = f"every row is longer than {settings.sequence_length} tokens, and too_long: drop leaves such rows out"
        return DataError(what, where="data", do="Raise sequence_length, or set too_long: cut.")
    if part.tally.truncated or part.tally.dropped:
        what = f"no token would be trained: in every row the answer starts after token {settings.sequence_length}"
        return DataError(what, where="data", do="Raise sequence_length, or shorten the prompts.")
    what = "no token would be trained: no row has an answer that the chat template writes"
    return DataError(what, where="data", do="Look at the rows with 'finetui data', and check chat_template.")
