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
from latentdiff.evaluate_vae import Thresholds, evaluate_run
from latentdiff.models.autoencoder import Posterior
from latentdiff.models.modes import evaluating
from latentdiff.models.perceptual import get_perceptual
from latentdiff.report import write_report
from latentdiff.training import loop, setup
from latentdiff.training.adversary import Adversary, Critic
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
from latentdiff.training.output_variance import OutputVariance
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.randomness import Purpose, normal
from latentdiff.training.schedules import ema_decay_at, learning_rate_at
from latentdiff.training.stopping import StopRequest
from latentdiff.training.tally import Tally
from latentdiff.training.validation import reconstruction_grid, validate_vae
from latentdiff.vae_losses import reconstruction_error


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
    vae = setup.start_autoencoder(config)
    vae.enable_gradient_checkpointing(train.gradient_checkpointing)
    vae.to(accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format)
    if train.compile:
        vae.compile()
    accelerator.print(setup.describe(vae))
    seen_size = train.crop_size or config.data.size
    latent_shape = (config.model.latent_channels, *2 * (seen_size // config.model.downsampling,))
    perceptual = None
    if config.loss.perceptual is not None:
        perceptual = get_perceptual(config.loss.perceptual, config.loss.perceptual_weights).to(accelerator.device)
    setup.check_losses(config, perceptual, accelerator)

    def losses(pixels: Tensor, noise: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss without the adversary, its terms, and the reconstruction; losses are means over a micro-batch."""
        reconstruction, moments = model(pixels, noise)
        error = reconstruction_error(config.loss.reconstruction, reconstruction, pixels)
        kl = Posterior(moments.float()).kl() / pixels[0].numel()
        terms = {"reconstruction": error.mean(), "kl": kl.mean()}
        loss = terms["reconstruction"] if variance is None else variance.model(error).mean()
        if step >= config.loss.kl_start:
            loss = loss + config.loss.kl_weight * terms["kl"]
        if perceptual is not None:
            terms["perceptual"] = torch.zeros_like(loss)
            if step >= config.loss.perceptual_start:
                terms["perceptual"] = perceptual(reconstruction, pixels).mean()
                loss = loss + config.loss.perceptual_weight * terms["perceptual"]
        return loss, terms, reconstruction

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = setup.build_optimizer(vae, config.optimizer)
    spare = setup.spare_copy(vae, accelerator)
    model, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMA(vae, spare)
    power_ema = PowerEMA(vae, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    variance = OutputVariance(config.optimizer, accelerator) if config.loss.learned_variance else None
    adversary = None
    if config.loss.adversarial is not None:
        critic = Critic(setup.new_discriminator(config)).to(accelerator.device)
        adversary = Adversary(config.loss, config.optimizer, critic, vae.decoder.conv_out.weight, accelerator)
    if train.micro_batch_size == "auto":

        def trial(micro: int) -> None:
            pixels = torch.zeros(micro, config.model.in_channels, seen_size, seen_size, device=accelerator.device)
            with accelerator.no_sync(model):
                loss, *_ = losses(pixels, torch.zeros(micro, *latent_shape, device=pixels.device), train.steps)
                accelerator.backward(loss)
            if variance is not None:
                variance.optimizer.zero_grad(set_to_none=True)

        plan = setup.fit_micro_batch(accelerator, plan, vae, trial)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    names = ["loss", "reconstruction", "kl"]
    names += ["perceptual"] if config.loss.perceptual is not None else []
    names += ["adversarial", "discriminator", "discriminator_accuracy"] if adversary is not None else []
    tally = Tally(names, accelerator)
    settings = setup.settings(model=config.model, trained_part=config.trained_part)
    others = {} if variance is None else {"output_variance": (variance.module, variance.optimizer)}
    others |= {} if adversary is None else {"critic": (adversary.critic, adversary.optimizer)}
    state = TrainingState(vae, ema, optimizer, settings, config.model_dump(mode="json"), power_ema, tally, others)
    if resume(run, state, arguments.resume, accelerator) and adversary is not None:
        adversary.loaded()
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
    batches = StepBatches(
        len(pictures), plan, accelerator.process_index, train.seed, start_step, train.steps, config.data.repeat
    )
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
            opposed = adversary is not None and adversary.active(step)
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                last, share = turn == plan.accumulation - 1, 1 / plan.accumulation
                with loop.synchronising(accelerator, model, last):
                    pixels = loop.to_device(batch["pixels"], accelerator.device)
                    if train.crop_size is not None:
                        pixels = setup.random_crops(pixels, train.crop_size, train.seed, step, batch["slots"])
                    noise = normal(latent_shape, train.seed, Purpose.POSTERIOR, step, batch["slots"])
                    loss, terms, reconstruction = losses(pixels, loop.to_device(noise, accelerator.device), step)
                    if adversary is not None:
                        terms |= dict.fromkeys(names[-3:], torch.zeros_like(loss))
                    if opposed:
                        term, terms["adversarial"] = adversary.generator_term(
                            terms["reconstruction"], reconstruction, share
                        )
                        loss = loss + term
                    loop.backward(accelerator, loss, share)
                if opposed:
                    terms["discriminator"], terms["discriminator_accuracy"] = adversary.learn(
                        pixels, reconstruction.detach(), share, last=last
                    )
                tally.add([loss, *(terms[name] for name in names[1:])], share)
            grad_norm = loop.clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            # What is not finite in one of the networks skips the step of all.
            skip = tally.close(step, grad_norm, *([adversary.clip()] if opposed else []))
            loop.apply_gradients(accelerator, optimizer, skip)
            if variance is not None:
                variance.step(lr, skip)
            if opposed:
                adversary.step(lr * config.loss.discriminator_lr_factor, skip)
            ema.update(vae, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(vae, step)

            meter.add(plan.batch_size)
            bar.update()
            if loop.due(step + 1, config.logging.every, train.steps):
                reading = tally.read()
                loop.check_skipped(reading, train.max_skipped_steps, batches, pictures, run)
                values = {"lr": lr, "images_per_second": meter.read(), "skipped": reading.skipped}
                if adversary is not None:
                    values |= adversary.figures()
                    if reading.means and (told := adversary.watch(step + 1, reading.means["reconstruction"])):
                        accelerator.print(f"\n{told}")
                log.write(step + 1, reading.means | values)
                bar.set_postfix_str(loop.summary(reading, values["images_per_second"]))

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the averaged weights, with the latent scale measured over the whole training set
    if signal is not None:
        loop.stopped(accelerator, run, signal, step, arguments.resume)
        return
    vae = ema.publish(vae).eval()
    share = pictures.batches(config.validation.batch_size, accelerator.process_index, accelerator.num_processes)
    setup.scale_latents(vae, config, share, accelerator)
    if accelerator.is_main_process:
        vae.save_pretrained(run)
        evaluation = evaluate_run(
            run,
            Thresholds(),
            batch_size=config.validation.batch_size,
            device=str(accelerator.device),
            progress=show,
        )
        print(evaluation.text())
        write_report(run)
        print(f"autoencoder in {run}, curves in {run / 'report'}")
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
