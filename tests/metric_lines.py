"""Lines of metrics.jsonl as the two stages write them, for the tests of the charts and of the report."""

BINS = 3
TRAINING = [
    {"step": step, "loss": 8.0 / step, "grad_norm": 1.0 + step, "lr": 1e-4, "images_per_second": 50.0, "skipped": 0}
    for step in range(10, 50, 10)
]


def validated(step: int, loss: float, gap: float) -> dict[str, float]:
    """A stage 2 validation; bin b has b more than the mean."""
    values = {"step": step, "validation/loss": loss, "validation/baseline": 4.0, "validation/gap": gap}
    for b in range(BINS):
        values[f"validation/loss_bin_{b:02}"] = loss + b
        values[f"validation/baseline_bin_{b:02}"] = 4.0 + b
        values[f"validation/gap_bin_{b:02}"] = gap + b
    return values


STAGE_2 = [validated(0, 4.0, 0.0), *TRAINING, *(validated(step, 1.0 / step, step / 1e4) for step in (10, 20, 30, 40))]
STAGE_1 = [
    *({**line, "reconstruction": line["loss"] / 2, "kl": 0.1} for line in TRAINING),
    *(
        {"step": step, "validation/mse": 0.1, "validation/psnr": 5.0 + step, "validation/ssim": 0.5, "validation/kl": 9}
        for step in (0, 20, 40)
    ),
]
