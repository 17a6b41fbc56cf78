"""Stage 1: train the autoencoder.

python train_vae.py configs/demo/vae.yaml [section.key=value ...] [--resume latest|never|FOLDER]
accelerate launch train_vae.py configs/demo/vae.yaml

Writes saved/<run>/: config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the diffusers folder of the
autoencoder with its measured latent scale. The same command again continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentdiff.config import VAETrainingConfig, load_config
from latentdiff.data import StepBatches, loader, open_pictures
from latentdiff.evaluate import latent_statistics, reconstruction_quality
from latentdiff.formats.diffusers_folder import write_png
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.modes import evaluating
from latentdiff.training import loop, setup
from latentdiff.training.arguments import parse_arguments, run_as_command
from latentdiff.training.checkpoint import TrainingState, resume, save_checkpoint
from latentdiff.training.ema import EMA
from latentdiff.training.logging import Meter, MetricsLog, progress_bar
from latentdiff.training.randomness import Purpose, normal, seed_for
from latentdiff.training.schedules import ema_decay_at, learning_rate_at
from latentdiff.training.validation import reconstruction_grid, validate_vae


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the autoencoder (stage 1).")
    config = load_config(VAETrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    accelerator, plan = setup.start(train)
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
    accelerator.print(setup.describe(vae))

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = setup.build_optimizer(vae, config.optimizer)
    model, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMA(vae)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    state = TrainingState(vae, ema, optimizer, settings=setup.settings(model=config.model))
    resumed = resume(run, state, arguments.resume, accelerator)
    start_step = state.step
    setup.record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    log = MetricsLog(run, start_step, accelerator.is_main_process)
    batches = StepBatches(len(pictures), plan, accelerator.process_index, train.seed, start_step, train.steps)
    feed = iter(loader(pictures, batches, config.data.num_workers, pin_memory=accelerator.device.type == "cuda"))
    shown = (held_out if len(held_out) else pictures).first(config.validation.pictures)
    latent_shape = (config.model.latent_channels, *2 * (config.data.size // config.model.downsampling,))
    sums = torch.zeros(3, device=accelerator.device)  # loss, reconstruction, KL since the last line of the log
    meter, logged = Meter(), start_step

    with progress_bar("stage 1", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            fresh = step > start_step or not resumed  # what is due at the step of a resume has been done before it

            if fresh and loop.due(step, config.validation.every, train.steps) and accelerator.is_main_process:
                with ema.applied(vae), evaluating(vae):
                    if len(held_out):
                        scores = validate_vae(vae, held_out, config.validation.batch_size)
                        log.write(step, **{f"validation/{key}": value for key, value in scores.items()})
                    write_png(reconstruction_grid(vae, shown), run / "samples" / f"step_{step:08d}.png")
            if fresh and step > 0 and loop.due(step, config.output.checkpoint_every, train.steps):
                save_checkpoint(run, state, config.output.keep, accelerator)
            if step == train.steps:
                break

            lr = loop.set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                with loop.synchronising(accelerator, model, last=turn == plan.accumulation - 1):
                    pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
                    noise = normal(latent_shape, train.seed, Purpose.POSTERIOR, step, batch["slots"])
                    reconstruction, moments = model(pixels, noise.to(accelerator.device, non_blocking=True))
                    error = reconstruction.float() - pixels
                    mean_error = error.abs().mean() if config.loss.reconstruction == "l1" else error.square().mean()
                    kl = Posterior(moments.float()).kl().mean() / pixels[0].numel()
                    loss = mean_error + config.loss.kl_weight * kl
                    accelerator.backward(loss / plan.accumulation)
                    sums += torch.stack([loss, mean_error, kl]).detach() / plan.accumulation
            grad_norm = loop.clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(vae, ema_decay_at(step, train.ema_decay))

            meter.add(plan.batch_size)
            bar.update()
            if loop.due(step + 1, config.logging.every, train.steps):
                loss, mean_error, kl = loop.mean_over_processes(accelerator, sums / (step + 1 - logged))
                loop.check_finite(loss, step + 1, run)
                rate = meter.read()
                log.write(
                    step + 1,
                    **{"loss": loss, "reconstruction": mean_error, "kl": kl, "grad_norm": float(grad_norm)},
                    **{"lr": lr, "images_per_second": rate},
                )
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")
                sums.zero_()
                logged = step + 1

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the averaged weights, with the latent scale measured over the whole training set
    ema.copy_to(vae)
    vae.eval()
    share = pictures.batches(config.validation.batch_size, accelerator.process_index, accelerator.num_processes)
    vae.set_latent_statistics(*latent_statistics(vae, share, accelerator))
    if accelerator.is_main_process:
        vae.save_pretrained(run)
        if len(held_out):
            quality = reconstruction_quality(AutoencoderKL.from_pretrained(run), held_out, config.validation.batch_size)
            print(f"held-out pictures: PSNR {quality.psnr:.2f} dB, SSIM {quality.ssim:.3f}")
        else:
            print("no held-out pictures (data.holdout is 0), so no PSNR and SSIM")
        print(f"autoencoder in {run}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_as_command(main)
