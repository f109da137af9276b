"""Facts and Reasons: a plan's speed, time and cost, and why each setting has its value."""

from __future__ import annotations

from ...planner.plan import Plan, Reason
from .. import format  # noqa: A004
from .lines import Line, Lines, wrapped
from .term_rows import TermRows

_LABEL = 9


class Facts(TermRows):
    """How fast, how long, how much, how many parameters."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._plan: Plan | None = None

    def names(self) -> list[str]:
        """See :class:`TermRows`."""
        return ["speed", "time", "cost"] if self._plan is not None else []

    def show(self, plan: Plan | None) -> None:
        """Draw a plan; None draws nothing."""
        rows = self.lines_needed(self.size.width)
        self._plan = plan
        if rows != self.lines_needed(self.size.width):
            self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._plan is None:
            return []
        lines: list[Line] = []
        for label, text, note in facts(self._plan):
            line: Line = [*self.mark(label), (label.ljust(_LABEL - 2), "dim"), (text, "bold")]
            if _LABEL + len(text) + 2 + len(note) <= width:
                line.append((f"  {note}", "dim"))
            lines.append(line)
        return lines


def facts(plan: Plan) -> list[tuple[str, str, str]]:
    """Label, figure and a note that may be left out, one per line."""
    speed, resolved, model = plan.speed, plan.resolved, plan.model
    share = model.trainable / max(model.parameters, 1)
    steps = f"{resolved.steps:,} steps of {format.duration(speed.step_s)}"
    if len(plan.stages) > 1:  # the steps are those of one of them, the time is that of all
        steps = f"{len(plan.stages)} stages"
    return [
        ("speed", f"{format.rate(speed.tokens_per_s)} tokens/s", f"MFU {speed.mfu:.0%}" if speed.mfu else ""),
        ("time", format.duration(plan.time_s), steps),
        ("cost", *_cost(plan)),
        ("trains", f"{format.count(model.trainable)} of {format.count(model.parameters)}", f"{share:.2%}"),
    ]


def _cost(plan: Plan) -> tuple[str, str]:
    cost = plan.cost
    if not cost.usd_per_h:
        return "$0", "this machine" if plan.hardware.local else "no price known"
    as_of = f", {cost.as_of}" if cost.as_of else ""
    return f"{format.usd(cost.usd)} at {format.usd(cost.usd_per_h)}/h", f"{cost.provider}{as_of}"


class Reasons(Lines):
    """Warnings, then one paragraph per setting. As high as it has to be: put it into something that scrolls."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._plan: Plan | None = None
        self._error: tuple[str, str] | None = None

    def show(self, plan: Plan | None, error: tuple[str, str] | None = None) -> None:
        """Draw a plan's reasons, or an error as what happened and what to do."""
        self._plan, self._error = plan, error
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        lines: list[Line] = []
        if self._error is not None:
            what, do = self._error
            lines += wrapped(format.sentence(f"✘ {what}"), width, "bad", indent="  ")
            lines += wrapped(format.sentence(f"  {do}"), width, "", indent="  ") if do else []
        if self._plan is None:
            return lines
        for warning in self._plan.warnings:
            lines += wrapped(format.sentence(f"! {warning}"), width, "warn", indent="  ")
        if self._plan.memory.lever and not self._plan.fits:
            lines += wrapped(f"  {self._plan.memory.lever}", width, "", indent="  ")
        heads = [_head(reason) for reason in self._plan.reasons]
        fitting = [len(head) for head in heads if len(head) <= width // 3]
        for head, reason in zip(heads, self._plan.reasons, strict=True):
            indent = max(fitting, default=2) + 2 if width >= 60 else 4
            if len(head) < indent:
                body = wrapped(format.sentence(reason.why), width - indent)
                lines.append([(head.ljust(indent), "accent"), *body[0]])
                lines += [[(" " * indent, ""), *rest] for rest in body[1:]]
            else:
                lines.append([(head, "accent")])
                lines += [[(" " * indent, ""), *rest] for rest in wrapped(format.sentence(reason.why), width - indent)]
        return lines


def _head(reason: Reason) -> str:
    return f"{reason.setting.replace('_', ' ')} {format.setting(reason.value)}"
