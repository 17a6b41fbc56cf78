"""Stage 1: train the autoencoder.

python train_vae.py configs/demo/vae.yaml [section.key=value ...] [--resume latest|never|FOLDER]
accelerate launch --multi_gpu train_vae.py configs/demo/vae.yaml

Writes saved/<run>/: config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the diffusers folder of the
autoencoder with its measured latent scale. The same command again continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.config import VAETrainingConfig, load_config
from latentdiff.data import StepBatches, loader, open_pictures
from latentdiff.evaluate import latent_statistics, reconstruction_quality
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.modes import evaluating
from latentdiff.report import write_report
from latentdiff.training import loop, setup
from latentdiff.training.arguments import parse_arguments, run_as_command
from latentdiff.training.checkpoint import (
    TrainingState,
    expected_size,
    require_disk_space,
    resume,
    save_checkpoint,
)
from latentdiff.training.ema import EMA
from latentdiff.training.logging import Meter, MetricsLog, progress_bar
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.randomness import Purpose, normal, seed_for
from latentdiff.training.schedules import ema_decay_at, learning_rate_at
from latentdiff.training.stopping import StopRequest
from latentdiff.training.tally import Tally
from latentdiff.training.validation import reconstruction_grid, validate_vae


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the autoencoder (stage 1).")
    config = load_config(VAETrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    accelerator, plan = setup.start(config)
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    pictures, held_out = open_pictures(config.data, config.model.in_channels, train.seed, progress=show)
    accelerator.print(f"{len(pictures)} training pictures, {len(held_out)} held out, {config.data.size} px")

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    # The scale of the latents is measured at the end; until then they are the posterior's own.
    unscaled = config.model.model_copy(update={"scaling_factor": 1.0, "shift_factor": None})
    vae = AutoencoderKL.from_config(unscaled, seed_for(train.seed, Purpose.INIT))
    vae.enable_gradient_checkpointing(train.gradient_checkpointing)
    vae.to(accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format)
    if train.compile:
        vae.compile()
    accelerator.print(setup.describe(vae))
    latent_shape = (config.model.latent_channels, *2 * (config.data.size // config.model.downsampling,))

    def losses(pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, reconstruction error and KL, means over a micro-batch."""
        reconstruction, moments = model(pixels, noise)
        error = reconstruction.float() - pixels
        mean_error = error.abs().mean() if config.loss.reconstruction == "l1" else error.square().mean()
        kl = Posterior(moments.float()).kl().mean() / pixels[0].numel()
        return mean_error + config.loss.kl_weight * kl, mean_error, kl

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = setup.build_optimizer(vae, config.optimizer)
    spare = setup.spare_copy(vae, accelerator)
    model, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMA(vae, spare)
    power_ema = PowerEMA(vae, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    if train.micro_batch_size == "auto":

        def trial(micro: int) -> None:
            pixels = torch.zeros(micro, *pictures.first(1).shape[1:], device=accelerator.device)
            with accelerator.no_sync(model):
                accelerator.backward(losses(pixels, torch.zeros(micro, *latent_shape, device=pixels.device))[0])

        plan = setup.fit_micro_batch(accelerator, plan, vae, trial)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    tally = Tally(["loss", "reconstruction", "kl"], accelerator)
    settings = setup.settings(model=config.model)
    state = TrainingState(vae, ema, optimizer, settings, config.model_dump(mode="json"), power_ema, tally)
    resume(run, state, arguments.resume, accelerator)
    start_step = state.step
    loop.check_steps(start_step, train.steps, run)
    if start_step < train.steps:
        averages = 1 if power_ema is None else 1 + len(config.ema.snapshot_lengths)
        require_disk_space(run, expected_size(vae, averages))
    setup.record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    setup.open_trackers(config, accelerator, start_step)
    log = MetricsLog(run, start_step, state.pending, accelerator)
    batches = StepBatches(len(pictures), plan, accelerator.process_index, train.seed, start_step, train.steps)
    feed = iter(loader(pictures, batches, config.data.num_workers, pin_memory=accelerator.device.type == "cuda"))
    shown = (held_out if len(held_out) else pictures).first(config.validation.pictures)
    meter = Meter()

    with StopRequest(accelerator) as stop, progress_bar("stage 1", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            signal = stop.agreed()

            if signal is None and state.pending:
                if loop.due(step, config.validation.every, train.steps):
                    with ema.applied(vae) as averaged, evaluating(averaged):
                        if len(held_out):
                            scores = validate_vae(averaged, held_out, config.validation.batch_size, accelerator)
                            log.write(step, {f"validation/{key}": value for key, value in scores.items()})
                        if accelerator.is_main_process:
                            log.picture(step, reconstruction_grid(averaged, shown))
                if power_ema is not None and step > 0 and loop.due(step, config.ema.snapshot_every, train.steps):
                    loop.write_snapshot(run, step, power_ema, accelerator)
                state.pending = False
            if signal is not None or (step > 0 and loop.due(step, config.output.checkpoint_every, train.steps)):
                save_checkpoint(run, state, config.output, accelerator)
            if signal is not None or step == train.steps:
                break
            state.pending = True

            lr = loop.set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                with loop.synchronising(accelerator, model, last=turn == plan.accumulation - 1):
                    pixels = loop.to_device(batch["pixels"], accelerator.device)
                    noise = normal(latent_shape, train.seed, Purpose.POSTERIOR, step, batch["slots"])
                    loss, error, kl = losses(pixels, loop.to_device(noise, accelerator.device))
                    loop.backward(accelerator, loss, 1 / plan.accumulation)
                    tally.add([loss, error, kl], 1 / plan.accumulation)
            grad_norm = loop.clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            loop.apply_gradients(accelerator, optimizer, skip=tally.close(step, grad_norm))
            ema.update(vae, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(vae, step)

            meter.add(plan.batch_size)
            bar.update()
            if loop.due(step + 1, config.logging.every, train.steps):
                reading = tally.read()
                loop.check_skipped(reading, train.max_skipped_steps, batches, pictures, run)
                values = {"lr": lr, "images_per_second": meter.read(), "skipped": reading.skipped}
                log.write(step + 1, reading.means | values)
                bar.set_postfix_str(loop.summary(reading, values["images_per_second"]))

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the averaged weights, with the latent scale measured over the whole training set
    if signal is not None:
        loop.stopped(accelerator, run, signal, step, arguments.resume)
        return
    vae = ema.publish(vae).eval()
    share = pictures.batches(config.validation.batch_size, accelerator.process_index, accelerator.num_processes)
    vae.set_latent_statistics(*latent_statistics(vae, share, accelerator))
    if accelerator.is_main_process:
        vae.save_pretrained(run)
        if len(held_out):
            published = AutoencoderKL.from_pretrained(run).to(accelerator.device)
            quality = reconstruction_quality(published, held_out, config.validation.batch_size)
            print(f"held-out pictures: PSNR {quality.psnr:.2f} dB, SSIM {quality.ssim:.3f}")
        else:
            print("no held-out pictures (data.holdout is 0), so no PSNR and SSIM")
        write_report(run)
        print(f"autoencoder in {run}, curves in {run / 'report'}")
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
