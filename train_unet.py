"""Stage 2: train the text-conditioned UNet on the latents of stage 1, or on the pictures themselves.

python train_unet.py configs/demo/unet.yaml [section.key=value ...] [--resume latest|never|FOLDER]
accelerate launch --multi_gpu train_unet.py configs/demo/unet.yaml

Writes saved/<run>/: config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the complete pipeline in the
diffusers layout. The same command again continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data import Batch, StepBatches, loader, open_pictures
from latentdiff.diffusion import NoiseSchedule, Objective, drop_captions
from latentdiff.latent_cache import LatentCache, encode_means
from latentdiff.models.denoiser import Denoiser
from latentdiff.models.modes import evaluating
from latentdiff.models.text import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline
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
from latentdiff.training.logging import Meter, MetricsLog, picture_grid, progress_bar
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.randomness import Purpose, normal, seed_for, spread_timesteps, uniform
from latentdiff.training.schedules import caption_dropout_at, ema_decay_at, learning_rate_at
from latentdiff.training.stopping import StopRequest
from latentdiff.training.tally import Tally
from latentdiff.training.validation import draw_validation_images, gap_metrics, prompts_at, validation_loss


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the text-conditioned UNet (stage 2).")
    config = load_config(UNetTrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    schedule = NoiseSchedule(**config.diffusion.model_dump(exclude={"caption_dropout", "offset_noise"}))
    objective = Objective(**config.loss.model_dump())
    vae = setup.open_latent_space(config)
    accelerator, plan = setup.start(config)
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    pictures, held_out = open_pictures(config.data, vae.config.in_channels, train.seed, progress=show)
    accelerator.print(f"{len(pictures)} training pictures, {len(held_out)} held out, {config.data.size} px")
    vae.to(accelerator.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    text_encoder = setup.build_text_encoder(config.text, seed_for(train.seed, Purpose.TEXT_INIT))
    text_encoder.to(accelerator.device)
    tokenizer = CLIPTokenizer.load(max_length=text_encoder.max_length)
    unet = UNet.from_config(config.model, seed_for(train.seed, Purpose.INIT))
    unet.enable_gradient_checkpointing(train.gradient_checkpointing)
    denoiser = Denoiser(unet, text_encoder if config.text.pretrained is None else None)
    denoiser.to(
        accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format
    )
    if train.compile:
        denoiser.compile()
    accelerator.print(setup.describe(denoiser))
    validation = config.validation
    defaults = GenerationDefaults(
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        sampler=validation.sampler,
        sigmas=validation.sigmas,
    )
    defaults.levels(schedule)  # steps that the sampler cannot make are told before training
    latent_shape = (config.model.in_channels, *2 * (config.data.size // vae.config.downsampling,))
    empty_ids = tokenizer([""])[0].to(accelerator.device)

    def condition(input_ids: Tensor) -> Tensor:
        """input_ids themselves if the text encoder is trained along, else the frozen encoder's context."""
        if config.text.pretrained is None:
            return input_ids
        with torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
            return text_encoder(input_ids)

    def pipeline_of(averaged: Denoiser) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline(
            vae, averaged.unet, averaged.text_encoder or text_encoder, tokenizer, schedule, defaults
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = setup.build_optimizer(denoiser, config.optimizer)
    spare = setup.spare_copy(denoiser, accelerator)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMA(denoiser, spare)
    power_ema = PowerEMA(denoiser, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    if train.micro_batch_size == "auto":

        def trial(micro: int) -> None:
            blank = torch.zeros(micro, *latent_shape, device=accelerator.device)
            timesteps = torch.zeros(micro, dtype=torch.long, device=blank.device)
            with accelerator.no_sync(model):
                ids = empty_ids.expand(micro, -1)
                losses = schedule.loss(model, blank, condition(ids), blank, timesteps, objective)
                accelerator.backward(losses.mean())

        plan = setup.fit_micro_batch(accelerator, plan, denoiser, trial)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    tally = Tally(["loss"], accelerator)
    settings = setup.settings(
        model=config.model,
        text=config.text,
        prediction_type=schedule.prediction_type,
        latent_space="pixels" if vae.bounded else "autoencoder",
    )
    state = TrainingState(denoiser, ema, optimizer, settings, config.model_dump(mode="json"), power_ema, tally)
    resume(run, state, arguments.resume, accelerator)
    start_step = state.step
    loop.check_steps(start_step, train.steps, run)
    if start_step < train.steps:
        averages = 1 if power_ema is None else 1 + len(config.ema.snapshot_lengths)
        require_disk_space(run, expected_size(denoiser, averages))
    setup.record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    batches = StepBatches(
        len(pictures), plan, accelerator.process_index, train.seed, start_step, train.steps, config.data.repeat
    )
    cache = None
    if train.cache_latents:
        cache = LatentCache.open(
            run / "latents" if train.cache_folder is None else Path(train.cache_folder).expanduser(),
            "train",
            pictures,
            vae,
            tokenizer,
            None if config.text.pretrained is None else text_encoder,
            validation.batch_size,
            accelerator,
            show,
            replace=train.cache_folder is None,
        )
    input_ids = tokenizer(pictures.captions) if cache is None else None
    empty_context = None if cache is None or cache.empty_context is None else cache.empty_context.to(accelerator.device)

    def latents_of(batch: Batch) -> Tensor:
        """A posterior draw of the batch's latents, from the cache or by encoding its pictures."""
        noise = normal(latent_shape, train.seed, Purpose.POSTERIOR, batch["step"], batch["slots"])
        with torch.no_grad():
            if cache is None:
                moments = vae.encode(loop.to_device(batch["pixels"], accelerator.device))
            else:
                moments = loop.to_device(batch["moments"], accelerator.device)
            return vae.sample(moments, loop.to_device(noise, accelerator.device))

    def condition_of(batch: Batch) -> Tensor:
        """What the UNet is told of the batch's captions, some of which are dropped."""
        draws = uniform(train.seed, Purpose.CAPTION_DROPOUT, batch["step"], batch["slots"])
        draws = loop.to_device(draws, accelerator.device)
        dropout = caption_dropout_at(batch["step"], train.steps, config.diffusion.caption_dropout)
        if empty_context is not None:
            return drop_captions(loop.to_device(batch["context"], accelerator.device), empty_context, dropout, draws)
        ids = batch["input_ids"] if cache is not None else input_ids[batch["index"]]
        return condition(drop_captions(loop.to_device(ids, accelerator.device), empty_ids, dropout, draws))

    def noise_of(batch: Batch) -> Tensor:
        """Unit Gaussian noise; with diffusion.offset_noise each channel of it is shifted (Guttenberg 2023)."""
        noise = normal(latent_shape, train.seed, Purpose.NOISE, batch["step"], batch["slots"])
        if config.diffusion.offset_noise:
            shape = (latent_shape[0], 1, 1)
            shift = normal(shape, train.seed, Purpose.OFFSET_NOISE, batch["step"], batch["slots"])
            noise = noise + config.diffusion.offset_noise * shift
        return loop.to_device(noise, accelerator.device)

    if validation.max_pictures is not None:
        held_out = held_out.some(validation.max_pictures)
    # As many training pictures as are held out: if the model is much better on them, it has learned them by heart.
    probes = [pictures.some(len(held_out)), held_out] if len(held_out) else []
    probes = [(encode_means(vae, probe, validation.batch_size), tokenizer(probe.captions)) for probe in probes]

    def measure(averaged: Denoiser) -> dict[str, float]:
        """The loss on held-out pictures by noise level, and how much lower it is on training pictures."""
        seen, unseen = (
            validation_loss(
                averaged,
                schedule,
                latents,
                lambda indices, ids=ids: condition(ids[indices].to(accelerator.device)),
                validation.batch_size,
                validation.bins,
                accelerator,
            )
            for latents, ids in probes
        )
        return unseen.metrics("validation") | gap_metrics(seen, unseen)

    setup.open_trackers(config, accelerator, start_step)
    log = MetricsLog(run, start_step, state.pending, accelerator)
    workers = config.data.num_workers if cache is None else 0  # cached data is read faster in this process
    feed = iter(
        loader(pictures if cache is None else cache, batches, workers, pin_memory=accelerator.device.type == "cuda")
    )
    meter = Meter()

    with StopRequest(accelerator) as stop, progress_bar("stage 2", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            signal = stop.agreed()

            if signal is None and state.pending:
                validate = len(held_out) > 0 and loop.due(step, validation.every, train.steps)
                draw = step > 0 and loop.due(step, validation.sample_every, train.steps)
                if validate or draw:
                    with ema.applied(denoiser) as averaged, evaluating(averaged), accelerator.autocast():
                        if validate:
                            log.write(step, measure(averaged))
                        if draw:
                            images = draw_validation_images(
                                pipeline_of(averaged),
                                prompts_at(step, validation),
                                validation.seed,
                                config.data.size,
                                validation.batch_size,
                                accelerator,
                            )
                            log.picture(step, picture_grid(images))
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
                latents, noise, total = latents_of(batch), noise_of(batch), schedule.num_train_timesteps
                timesteps = spread_timesteps(total, train.seed, step, batch["slots"], plan.batch_size)
                timesteps = loop.to_device(timesteps, latents.device)
                with loop.synchronising(accelerator, model, last=turn == plan.accumulation - 1):
                    loss = schedule.loss(model, latents, condition_of(batch), noise, timesteps, objective).mean()
                    loop.backward(accelerator, loss, 1 / plan.accumulation)
                tally.add([loss], 1 / plan.accumulation)
            grad_norm = loop.clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            loop.apply_gradients(accelerator, optimizer, skip=tally.close(step, grad_norm))
            ema.update(denoiser, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(denoiser, step)

            meter.add(plan.batch_size)
            bar.update()
            if loop.due(step + 1, config.logging.every, train.steps):
                reading = tally.read()
                loop.check_skipped(reading, train.max_skipped_steps, batches, pictures, run)
                values = {"lr": lr, "images_per_second": meter.read(), "skipped": reading.skipped}
                log.write(step + 1, reading.means | values)
                bar.set_postfix_str(loop.summary(reading, values["images_per_second"]))

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the complete pipeline, with the averaged weights
    if signal is not None:
        loop.stopped(accelerator, run, signal, step, arguments.resume)
        return
    pipeline = pipeline_of(ema.publish(denoiser))
    if accelerator.is_main_process:
        pipeline.save_pretrained(run)
        write_report(run)
        print(f"pipeline in {run}, curves in {run / 'report'}")
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
