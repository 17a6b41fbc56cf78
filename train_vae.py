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
from latentdiff.data.batches import StepBatches, loader
from latentdiff.data.captioned_images import open_images
from latentdiff.devices import to_device
from latentdiff.evaluation.autoencoder import Thresholds, evaluate_run
from latentdiff.models.autoencoder import Posterior
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.perceptual import get_perceptual
from latentdiff.randomness import Stream, normal
from latentdiff.training.accelerator import fit_micro_batch, open_trackers, start
from latentdiff.training.adversary import Adversary, Critic
from latentdiff.training.arguments import parse_arguments, run_as_command
from latentdiff.training.autoencoder import random_crops, scale_latents, start_autoencoder
from latentdiff.training.checkpoint import (
    TrainingState,
    expected_size,
    require_disk_space,
    resume,
    save_checkpoint,
)
from latentdiff.training.ema import EMA, ema_decay_at, make_full_copy
from latentdiff.training.logging import MetricsLog, ThroughputMeter, progress_bar
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    synchronising,
)
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.report import write_report
from latentdiff.training.run import (
    check_skipped,
    check_steps,
    describe,
    due,
    model_settings,
    record,
    stopped,
    summary,
    write_snapshot,
)
from latentdiff.training.stopping import StopRequest
from latentdiff.training.vae_evaluation import reconstruction_grid, validate_vae
from latentdiff.training.vae_objective import LearnedLogvar, check_losses, new_discriminator, reconstruction_error


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the autoencoder (stage 1).")
    config = load_config(VAETrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    accelerator, plan = start(config)
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    images, held_out = open_images(config.data, config.model.in_channels, train.seed, progress=show)
    accelerator.print(f"{len(images)} training images, {len(held_out)} held out, {config.data.size} px")

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    vae = start_autoencoder(config)
    vae.enable_gradient_checkpointing(train.gradient_checkpointing)
    vae.to(accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format)
    if train.compile:
        vae.compile()
    accelerator.print(describe(vae))
    seen_size = train.crop_size or config.data.size
    latent_shape = (config.model.latent_channels, *2 * (seen_size // config.model.downsampling,))
    perceptual = None
    if config.loss.perceptual is not None:
        perceptual = get_perceptual(config.loss.perceptual, config.loss.perceptual_weights).to(accelerator.device)
    check_losses(config, perceptual, accelerator)

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
    optimizer = build_optimizer(vae, config.optimizer)
    full_copy = make_full_copy(vae, accelerator)
    model, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMA(vae, full_copy)
    power_ema = PowerEMA(vae, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    variance = LearnedLogvar(config.optimizer, accelerator) if config.loss.learned_logvar else None
    adversary = None
    if config.loss.adversarial is not None:
        critic = Critic(new_discriminator(config)).to(accelerator.device)
        adversary = Adversary(config.loss, config.optimizer, critic, vae.decoder.conv_out.weight, accelerator)
    if train.micro_batch_size == "auto":

        def trial(micro: int) -> None:
            pixels = torch.zeros(micro, config.model.in_channels, seen_size, seen_size, device=accelerator.device)
            with accelerator.no_sync(model):
                loss, *_ = losses(pixels, torch.zeros(micro, *latent_shape, device=pixels.device), train.steps)
                accelerator.backward(loss)
            if variance is not None:
                variance.optimizer.zero_grad(set_to_none=True)

        plan = fit_micro_batch(accelerator, plan, vae, trial)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    names = ["loss", "reconstruction", "kl"]
    names += ["perceptual"] if config.loss.perceptual is not None else []
    names += ["adversarial", "discriminator", "discriminator_accuracy"] if adversary is not None else []
    loss_meter = LossMeter(names, accelerator)
    fixed = model_settings(model=config.model, freeze_encoder=config.freeze_encoder)
    others = {} if variance is None else {"logvar": (variance.module, variance.optimizer)}
    others |= {} if adversary is None else {"critic": (adversary.critic, adversary.optimizer)}
    state = TrainingState(vae, ema, optimizer, fixed, config.model_dump(mode="json"), power_ema, loss_meter, others)
    if resume(run, state, arguments.resume, accelerator) and adversary is not None:
        adversary.loaded()
    start_step = state.step
    check_steps(start_step, train.steps, run)
    if start_step < train.steps:
        averages = 1 if power_ema is None else 1 + len(config.ema.snapshot_lengths)
        require_disk_space(run, expected_size(vae, averages))
    record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    open_trackers(config, accelerator, start_step)
    log = MetricsLog(run, start_step, state.pending, accelerator)
    batches = StepBatches(
        len(images), plan, accelerator.process_index, train.seed, start_step, train.steps, config.data.repeat
    )
    feed = iter(loader(images, batches, config.data.num_workers, pin_memory=accelerator.device.type == "cuda"))
    shown = (held_out if len(held_out) else images).first(config.validation.images)
    meter = ThroughputMeter()

    with StopRequest(accelerator) as stop, progress_bar("stage 1", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            signal = stop.agreed()

            if signal is None and state.pending:
                if due(step, config.validation.every, train.steps):
                    with ema.applied(vae) as averaged, eval_mode(averaged):
                        if len(held_out):
                            scores = validate_vae(averaged, held_out, config.validation.batch_size, accelerator)
                            log.write(step, {f"validation/{key}": value for key, value in scores.items()})
                        if accelerator.is_main_process:
                            log.write_image(step, reconstruction_grid(averaged, shown))
                if power_ema is not None and step > 0 and due(step, config.ema.snapshot_every, train.steps):
                    write_snapshot(run, step, power_ema, accelerator)
                state.pending = False
            if signal is not None or (step > 0 and due(step, config.output.checkpoint_every, train.steps)):
                save_checkpoint(run, state, config.output, accelerator)
            if signal is not None or step == train.steps:
                break
            state.pending = True

            lr = set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            opposed = adversary is not None and adversary.active(step)
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                last, share = turn == plan.accumulation - 1, 1 / plan.accumulation
                with synchronising(accelerator, model, last):
                    pixels = to_device(batch["pixels"], accelerator.device)
                    if train.crop_size is not None:
                        pixels = random_crops(pixels, train.crop_size, train.seed, step, batch["sample_indices"])
                    noise = normal(latent_shape, train.seed, Stream.POSTERIOR, step, batch["sample_indices"])
                    loss, terms, reconstruction = losses(pixels, to_device(noise, accelerator.device), step)
                    if adversary is not None:
                        terms |= dict.fromkeys(names[-3:], torch.zeros_like(loss))
                    if opposed:
                        term, terms["adversarial"] = adversary.generator_term(
                            terms["reconstruction"], reconstruction, share
                        )
                        loss = loss + term
                    backward(accelerator, loss, share)
                if opposed:
                    terms["discriminator"], terms["discriminator_accuracy"] = adversary.learn(
                        pixels, reconstruction.detach(), share, last=last
                    )
                loss_meter.add([loss, *(terms[name] for name in names[1:])], share)
            grad_norm = clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            # What is not finite in one of the networks skips the step of all.
            skip = loss_meter.close(step, grad_norm, *([adversary.clip()] if opposed else []))
            apply_gradients(accelerator, optimizer, skip)
            if variance is not None:
                variance.step(lr, skip)
            if opposed:
                adversary.step(lr * config.loss.discriminator_lr_factor, skip)
            ema.update(vae, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(vae, step)

            meter.add(plan.batch_size)
            bar.update()
            if due(step + 1, config.logging.every, train.steps):
                reading = loss_meter.read()
                check_skipped(reading, train.max_skipped_steps, batches, images, run)
                values = {"lr": lr, "images_per_second": meter.read(), "skipped": reading.skipped}
                if adversary is not None:
                    values |= adversary.figures()
                    if reading.means and (told := adversary.watch(step + 1, reading.means["reconstruction"])):
                        accelerator.print(f"\n{told}")
                log.write(step + 1, reading.means | values)
                bar.set_postfix_str(summary(reading, values["images_per_second"]))

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the averaged weights, with the latent scale measured over the whole training set
    if signal is not None:
        stopped(accelerator, run, signal, step, arguments.resume)
        return
    vae = ema.averaged_model(vae).eval()
    share = images.batches(config.validation.batch_size, accelerator.process_index, accelerator.num_processes)
    scale_latents(vae, config, share, accelerator)
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
