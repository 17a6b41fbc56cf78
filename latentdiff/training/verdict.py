"""What the numbers of a run say, in one sentence: does it learn, is it stuck, does it overfit?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latentdiff.figures.charts import Series, by_bin, published_step, running_mean

# A rise of the validation loss that counts, relative to its best. Its images, noise and timesteps are fixed, so it
# moves by 1 to 2 % between validations while a model learns, and by far more once it memorises.
RISE = 0.05
# A validation loss above this fraction of the baseline is at the baseline. Random weights give 1.00 to 1.02; the noise
# level that trained models found hardest ends at 0.92.
STUCK = 0.98
# A fall of less than this fraction over so many validations is none.
FLAT, FLAT_VALIDATIONS = 0.01, 3

Kind = Literal[
    "nothing measured", "not finite", "no validation set", "overfitting", "stuck", "worse", "flat", "improving"
]
ALARMING = ("not finite", "overfitting", "stuck", "worse")


@dataclass(frozen=True)
class Verdict:
    """How a run goes. title: a few words; sentence: why, with the numbers; notes: further sentences.

    step, loss: of the latest validation; best_step, best_loss: of the lowest. None if there was none.
    """

    kind: Kind
    title: str
    sentence: str
    notes: tuple[str, ...] = ()
    step: int | None = None
    loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None

    @property
    def is_alarming(self) -> bool:
        """Whether something should be done about it."""
        return self.kind in ALARMING

    @property
    def text(self) -> str:
        """Title, sentence and notes as one line."""
        return " ".join([f"{self.title}. {self.sentence}", *self.notes])


@dataclass(frozen=True)
class _Losses:
    """The validation losses from where they compare, ascending, and the training loss beside them."""

    name: str  # of the measure
    validation: Series
    training: Series
    what: str  # the training loss is

    @property
    def last(self) -> int:
        return max(self.validation)

    @property
    def best(self) -> int:
        """The first step with the lowest loss."""
        return min(self.validation, key=lambda step: (self.validation[step], step))

    def trained_at(self, step: int) -> float:
        """The training loss at the last measurement that is not after `step`; the first one if all are."""
        before = [number for number in self.training if number <= step]
        return self.training[before[-1] if before else min(self.training)]

    @property
    def has_risen(self) -> bool:
        return self.validation[self.last] > (1 + RISE) * self.validation[self.best]

    @property
    def is_flat(self) -> bool:
        values = list(self.validation.values())
        recent, earlier = values[-FLAT_VALIDATIONS:], values[:-FLAT_VALIDATIONS]
        return bool(earlier) and min(recent) > (1 - FLAT) * min(earlier)


def verdict(metrics: Mapping[str, Series], *, publishes_best: bool = True, complete_at: int = 0) -> Verdict:
    """The verdict on the numbers of a run of either stage, as `report.read_metrics` gives them.

    publishes_best: whether the step with the lowest validation loss will be published, for a run that is not finished.
    complete_at: validations of earlier steps are not compared, as the loss was another one.
    """
    training = running_mean(metrics.get("loss", {}))
    skipped = int(sum(metrics.get("skipped", {}).values()))
    notes = []
    if skipped:
        steps = f"{skipped:,} step{' was' if skipped == 1 else 's were'}"
        notes.append(f"{steps} skipped, as the loss or its gradient was not finite.")
    if not training:
        if skipped:
            return Verdict("not finite", "No finite loss", "No step so far had a finite loss.", (*notes,))
        return Verdict("nothing measured", "Nothing measured yet", "No training step has been logged.")
    fell = f"the training loss went from {_number(training[min(training)])} to {_number(training[max(training)])}"
    is_stage_1 = "validation/mse" in metrics
    measured = metrics.get("validation/mse" if is_stage_1 else "validation/loss", {})
    if not measured:
        sentence = f"Overfitting cannot be seen; {fell}."
        return Verdict("no validation set", "There is no validation set", sentence, (*notes,))
    compared = {step: value for step, value in measured.items() if step >= complete_at and step > 0}
    if not compared:
        last, best = max(measured), min(measured, key=lambda step: measured[step])
        sentence = f"No validation since the start yet; {fell}."
        values = (last, measured[last], best, measured[best])
        return Verdict("nothing measured", "Too early to tell", sentence, (*notes,), *values)
    # Step 0 counts too: a model can be worse than the random weights that it started from.
    compared |= {0: measured[0]} if 0 in measured and complete_at == 0 else {}
    compared = dict(sorted(compared.items()))
    gap = metrics.get("validation/gap", {})
    if compared.keys() <= gap.keys():
        same_noise = {step: value - gap[step] for step, value in compared.items()}
        losses = _Losses("validation loss", compared, same_noise, "the loss on as many training images")
    else:
        name = "MSE of the held-out images" if is_stage_1 else "validation loss"
        losses = _Losses(name, compared, training, "the training loss")
    kind, title, sentence, more = _judged(losses, metrics, is_stage_1, publishes_best)
    values = (losses.last, compared[losses.last], losses.best, compared[losses.best])
    return Verdict(kind, title, sentence, (*more, *notes), *values)


def _judged(
    losses: _Losses, metrics: Mapping[str, Series], is_stage_1: bool, publishes_best: bool
) -> tuple[Kind, str, str, list[str]]:
    """Kind, title, sentence and notes of a run with validations."""
    last, best = losses.last, losses.best
    now, lowest = losses.validation[last], losses.validation[best]
    change = f"The {losses.name} has risen from {_number(lowest)} at step {best:,} to {_number(now)} at step {last:,}"
    fate = _published(published_step(metrics), best, publishes_best)
    if losses.has_risen:
        trained, before = losses.trained_at(last), losses.trained_at(best)
        if is_stage_1:
            return "worse", f"Worse than at step {best:,}", f"{change}; {fate}.", []
        if trained < before:
            sentence = (
                f"{change}, while {losses.what} fell from {_number(before)} to {_number(trained)}: the model memorises "
                f"its training images; {fate}."
            )
            return "overfitting", f"Overfitting since step {best:,}", sentence, []
        sentence = f"{change}, and {losses.what} has not fallen either: try a lower learning rate; {fate}."
        return "worse", f"Worse than at step {best:,}", sentence, []
    baseline = metrics.get("validation/baseline", {}).get(last)
    if baseline is not None and lowest > STUCK * baseline:
        sentence = (
            f"The {losses.name} is {_number(now)} after {last:,} steps, that of a constant prediction is "
            f"{_number(baseline)}: the model has learned nothing yet at any noise level."
        )
        return "stuck", "Stuck at the baseline", sentence, []
    notes = [] if is_stage_1 else _stuck_levels(metrics)
    against = "" if baseline is None else f" (a constant prediction has {_number(baseline)})"
    if losses.is_flat:
        sentence = (
            f"The {losses.name} has not fallen by {FLAT:.0%} in the last {FLAT_VALIDATIONS} validations: it is "
            f"{_number(now)}, the lowest is {_number(lowest)} at step {best:,}{against}."
        )
        return "flat", "No longer improving", sentence, notes
    first = next(iter(losses.validation))
    if first != best and lowest > (1 - FLAT) * losses.validation[first]:
        stands = f"it is {_number(now)} at step {last:,}{against}"
        sentence = f"The {losses.name} has fallen by less than {FLAT:.0%} so far: {stands}."
        return "nothing measured", "Too early to tell", sentence, notes
    start = f"from {_number(losses.validation[first])} at step {first:,} " if first != best else ""
    title = "Improving" if is_stage_1 else "Learning"
    sentence = f"The {losses.name} has fallen {start}to {_number(lowest)} at step {best:,}{against}."
    return "improving", title, sentence, notes


def _published(published: int | None, best: int, publishes_best: bool) -> str:
    """Which step's weights are, or will be, the final model."""
    if published == best:
        return f"the weights of step {best:,} are published"
    if published is not None:
        return f"the weights of step {published:,} are published (with output.publish=best: those of step {best:,})"
    if publishes_best:
        return f"the weights of step {best:,} will be published"
    return f"the weights of the last step will be published (with output.publish=best: those of step {best:,})"


def _stuck_levels(metrics: Mapping[str, Series]) -> list[str]:
    """A note on the noise levels at which the latest validation loss is at the baseline."""
    losses, baselines = by_bin(metrics, "validation/loss"), by_bin(metrics, "validation/baseline")
    if not losses or not baselines:
        return []
    last, baseline = losses[max(losses)], baselines[max(baselines)]
    stuck = [b + 1 for b, (loss, base) in enumerate(zip(last, baseline, strict=False)) if loss > STUCK * base]
    if not stuck:
        return []
    levels = f"level{'' if len(stuck) == 1 else 's'} {_ranges(stuck)}"
    return [f"At noise {levels} of {len(last)} (1: clean) it is no better than a constant prediction."]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "1, 3 to 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def _number(value: float) -> str:
    return f"{value:.3g}"
