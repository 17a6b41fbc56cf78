"""The verdict on a run's numbers, on curves whose answer is known and on one that was recorded."""

from pathlib import Path

import pytest

from latentdiff.figures.charts import Series
from latentdiff.training.report import read_metrics
from latentdiff.training.verdict import Verdict, verdict

ASSETS = Path(__file__).parents[1] / "assets"
STEPS = range(100, 700, 100)


def series(*values: float, start: int = 0) -> Series:
    return {start + 100 * i: value for i, value in enumerate(values)}


def stage_2(*validation: float, baseline: float = 1.0, training: Series | None = None, **further: Series) -> Verdict:
    """Of validations at steps 0, 100, ..., by default beside a training loss that falls."""
    fallen = training or {step: 1.0 / (1 + step / 100) for step in STEPS}
    metrics = {"validation/loss": series(*validation), "loss": fallen, **further}
    metrics["validation/baseline"] = dict.fromkeys(metrics["validation/loss"], baseline)
    return verdict(metrics)


def test_learning_names_the_lowest_loss_and_what_it_is_compared_with() -> None:
    said = stage_2(1.01, 0.8, 0.6, 0.4)
    assert said.text == (
        "Learning. The validation loss has fallen from 1.01 at step 0 to 0.4 at step 300 (a constant prediction has 1)."
    )
    assert (said.kind, said.is_alarming, said.notes) == ("improving", False, ())
    assert (said.step, said.loss, said.best_step, said.best_loss) == (300, 0.4, 300, 0.4)


def test_a_fall_of_less_than_a_percent_says_nothing_yet() -> None:
    """As of a LoRA after a few steps: its model was good before."""
    said = stage_2(0.6434, 0.643, baseline=1.0)
    assert (said.kind, said.title) == ("nothing measured", "Too early to tell") and said.best_step == 100
    assert said.sentence.startswith("The validation loss has fallen by less than 1% so far: it is 0.643 at step 100 (")
    assert stage_2(0.65, 0.643).title == "Learning"


def test_a_rise_of_the_validation_loss_alone_is_overfitting() -> None:
    said = stage_2(1.0, 0.5, 0.4, 0.5)
    assert (said.kind, said.title, said.is_alarming) == ("overfitting", "Overfitting since step 200", True)
    assert said.sentence == (
        "The validation loss has risen from 0.4 at step 200 to 0.5 at step 300, while the training loss fell from "
        "0.333 to 0.25: the model memorises its training images; the weights of step 200 will be published."
    )
    # 5 % are needed, and both losses rising is something else.
    assert stage_2(1.0, 0.5, 0.4, 0.419).kind == "improving" and stage_2(1.0, 0.5, 0.4, 0.421).kind == "overfitting"
    rising = stage_2(1.0, 0.5, 0.4, 0.5, training={100: 0.5, 200: 0.4, 300: 0.6})
    assert (rising.kind, rising.title) == ("worse", "Worse than at step 200")
    assert "the training loss has not fallen either: try a lower learning rate" in rising.sentence


def test_the_loss_on_training_images_with_the_same_noise_counts_where_it_is_measured() -> None:
    """The logged training loss falls, but the gap says that the model is no better on training images either."""
    assert stage_2(1.0, 0.5, 0.4, 0.5, **{"validation/gap": series(0, 0, 0, 0)}).kind == "worse"
    said = stage_2(1.0, 0.5, 0.4, 0.5, **{"validation/gap": series(0, 0.1, 0.1, 0.35)})
    assert said.kind == "overfitting" and "on as many training images fell from 0.3 to 0.15" in said.sentence


@pytest.mark.parametrize(
    ("published", "publishes_best", "fate"),
    [
        ({300: 200}, True, "the weights of step 200 are published."),
        ({300: 300}, False, "the weights of step 300 are published (with output.publish=best: those of step 200)."),
        ({}, False, "the weights of the last step will be published (with output.publish=best: those of step 200)."),
    ],
)
def test_overfitting_says_what_is_published(published: Series, publishes_best: bool, fate: str) -> None:
    metrics = {"validation/loss": series(1.0, 0.5, 0.4, 0.5), "loss": {100: 0.5, 200: 0.4, 300: 0.3}}
    metrics |= {"published_step": published} if published else {}
    assert verdict(metrics, publishes_best=publishes_best).sentence.endswith(fate)


def test_stuck_at_the_baseline() -> None:
    said = stage_2(1.02, 1.0, 0.99)
    assert (said.kind, said.title) == ("stuck", "Stuck at the baseline")
    assert said.sentence.startswith("The validation loss is 0.99 after 200 steps, that of a constant prediction is 1:")
    assert stage_2(1.02, 0.99, 0.97).kind == "improving"
    assert stage_2(0.6, 0.55, 0.5, baseline=0.5).kind == "stuck"  # clean latents have another baseline


def test_noise_levels_at_the_baseline_are_named() -> None:
    levels = {f"validation/loss_bin_{b:02}": {300: loss} for b, loss in enumerate((0.99, 0.5, 0.5, 0.985, 0.99, 1.2))}
    levels |= {f"validation/baseline_bin_{b:02}": {300: 1.0} for b in range(6)}
    said = stage_2(1.0, 0.9, 0.8, 0.7, **levels)
    assert said.kind == "improving"
    assert said.notes == ("At noise levels 1, 4 to 6 of 6 (1: clean) it is no better than a constant prediction.",)


def test_no_fall_over_three_validations_is_flat() -> None:
    said = stage_2(1.0, 0.5, 0.4, 0.399, 0.398, 0.397)
    assert (said.kind, said.is_alarming) == ("flat", False)
    assert said.sentence == (
        "The validation loss has not fallen by 1% in the last 3 validations: it is 0.397, the lowest is 0.397 at step "
        "500 (a constant prediction has 1)."
    )
    assert stage_2(1.0, 0.5, 0.4, 0.399, 0.398, 0.395).kind == "improving"


def test_without_a_validation_set_overfitting_cannot_be_seen() -> None:
    said = verdict({"loss": {10: 0.9, 20: 0.5}})
    assert said.text == (
        "There is no validation set. Overfitting cannot be seen; the training loss went from 0.9 to 0.5."
    )
    assert said.kind == "no validation set" and said.loss is None


def test_skipped_steps_are_counted() -> None:
    said = stage_2(1.0, 0.5, skipped={10: 0, 20: 3, 30: 2})
    assert said.notes == ("5 steps were skipped, as the loss or its gradient was not finite.",)
    said = verdict({"skipped": {10: 10}, "lr": {10: 1e-3}})
    assert (said.kind, said.is_alarming) == ("not finite", True) and said.text.startswith("No finite loss. No step")


def test_nothing_is_said_before_there_is_anything() -> None:
    assert verdict({}).kind == verdict({"validation/loss": {0: 1.0}}).kind == "nothing measured"
    said = verdict({"validation/loss": {0: 1.0}, "loss": {10: 0.9, 20: 0.8}})
    assert said.text == "Too early to tell. No validation since the start yet; the training loss went from 0.9 to 0.8."


def test_stage_1() -> None:
    loss = {100: 0.5, 200: 0.3, 300: 0.2}

    def said(*mse: float, complete_at: int = 0) -> Verdict:
        return verdict({"validation/mse": series(*mse), "loss": loss}, complete_at=complete_at)

    assert said(0.9, 0.1, 0.05).text == (
        "Improving. The MSE of the held-out images has fallen from 0.9 at step 0 to 0.05 at step 200."
    )
    worse = said(0.9, 0.1, 0.05, 0.08)
    assert (worse.kind, worse.title) == ("worse", "Worse than at step 200")
    assert said(0.9, 0.1, 0.05, 0.05, 0.05, 0.05).kind == "flat"
    # The adversarial loss starts at step 250, and raises the MSE: only what follows compares.
    assert said(0.9, 0.1, 0.05, 0.08, 0.07, complete_at=251).title == "Improving"
    assert said(0.9, 0.1, 0.05, complete_at=251).title == "Too early to tell"


def test_a_recorded_run_that_memorises() -> None:
    """The run of benchmarks/learning/memorisation.py on 16 images, until several of its steps."""
    metrics = read_metrics(ASSETS / "memorising_16_images.jsonl")

    def until(step: int) -> Verdict:
        kept = {key: {s: value for s, value in one.items() if s <= step} for key, one in metrics.items()}
        return verdict({key: one for key, one in kept.items() if one})

    assert until(0).title == "Nothing measured yet" and until(40).title == "Too early to tell"
    assert until(41).title == "Learning" and "level 10 of 10" in until(41).notes[0]  # 1.06 of the baseline
    assert until(123).title == "Learning" and until(123).best_step == 123
    assert until(205).title == "Overfitting since step 123"
    assert until(491).text == (
        "Overfitting since step 123. The validation loss has risen from 0.271 at step 123 to 0.355 at step 451, while "
        "the loss on as many training images fell from 0.159 to 0.0621: the model memorises its training images; the "
        "weights of step 123 will be published."
    )
    assert "the weights of step 492 are published (with output.publish=best: those of step 123)" in until(492).text
