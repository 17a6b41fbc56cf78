"""Stage 2: train the text-conditioned UNet on the latents of stage 1, or on the images themselves.

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
from latentdiff.data.batches import Batch, StepBatches, loader
from latentdiff.data.captioned_images import open_images
from latentdiff.data.latent_cache import LatentCache, encode_means
from latentdiff.devices import to_device
from latentdiff.diffusion.objective import diffusion_loss, drop_captions
from latentdiff.figures.grids import image_grid
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline
from latentdiff.randomness import Stream, normal, seed_for, spread_timesteps, uniform
from latentdiff.training.accelerator import fit_micro_batch, open_trackers, start
from latentdiff.training.arguments import parse_arguments, run_as_command
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
from latentdiff.training.unet_evaluation import gap_metrics, generate_validation_images, prompts_at, validation_loss
from latentdiff.training.unet_inputs import build_text_encoder, caption_dropout_at, open_latent_space


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the text-conditioned UNet (stage 2).")
    config = load_config(UNetTrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    schedule = config.diffusion
    objective = config.loss
    vae = open_latent_space(config)
    accelerator, plan = start(config)
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    images, held_out = open_images(config.data, vae.config.in_channels, train.seed, progress=show)
    accelerator.print(f"{len(images)} training images, {len(held_out)} held out, {config.data.size} px")
    vae.to(accelerator.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    text_encoder = build_text_encoder(config.text, seed_for(train.seed, Stream.TEXT_INIT))
    text_encoder.to(accelerator.device)
    tokenizer = CLIPTokenizer.load(max_length=text_encoder.max_length)
    unet = UNet.from_config(config.model, seed_for(train.seed, Stream.INIT))
    unet.enable_gradient_checkpointing(train.gradient_checkpointing)
    denoiser = TextConditionedUNet(unet, text_encoder if config.text.pretrained is None else None)
    denoiser.to(
        accelerator.device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format
    )
    if train.compile:
        denoiser.compile()
    accelerator.print(describe(denoiser))
    validation = config.validation
    defaults = GenerationDefaults(
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        sampler=validation.sampler,
        sigmas=validation.sigmas,
    )
    defaults.levels(schedule)  # steps that the sampler cannot make are told before training
    latent_shape = (config.model.in_channels, *2 * (config.data.size // vae.config.downsampling,))
    unconditional_ids = tokenizer([""])[0].to(accelerator.device)

    def condition(input_ids: Tensor) -> Tensor:
        """input_ids themselves if the text encoder is trained along, else the frozen encoder's context."""
        if config.text.pretrained is None:
            return input_ids
        with torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
            return text_encoder(input_ids)

    def pipeline_of(averaged: TextConditionedUNet) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline(
            vae, averaged.unet, averaged.text_encoder or text_encoder, tokenizer, schedule, defaults
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = build_optimizer(denoiser, config.optimizer)
    full_copy = make_full_copy(denoiser, accelerator)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMA(denoiser, full_copy)
    power_ema = PowerEMA(denoiser, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    if train.micro_batch_size == "auto":

        def trial(micro: int) -> None:
            blank = torch.zeros(micro, *latent_shape, device=accelerator.device)
            timesteps = torch.zeros(micro, dtype=torch.long, device=blank.device)
            with accelerator.no_sync(model):
                ids = unconditional_ids.expand(micro, -1)
                losses = diffusion_loss(model, schedule, blank, condition(ids), blank, timesteps, objective)
                accelerator.backward(losses.mean())

        plan = fit_micro_batch(accelerator, plan, denoiser, trial)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    loss_meter = LossMeter(["loss"], accelerator)
    fixed = model_settings(
        model=config.model,
        text=config.text,
        prediction_type=schedule.prediction_type,
        latent_space="pixels" if vae.bounded else "autoencoder",
    )
    state = TrainingState(denoiser, ema, optimizer, fixed, config.model_dump(mode="json"), power_ema, loss_meter)
    resume(run, state, arguments.resume, accelerator)
    start_step = state.step
    check_steps(start_step, train.steps, run)
    if start_step < train.steps:
        averages = 1 if power_ema is None else 1 + len(config.ema.snapshot_lengths)
        require_disk_space(run, expected_size(denoiser, averages))
    record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    batches = StepBatches(
        len(images), plan, accelerator.process_index, train.seed, start_step, train.steps, config.data.repeat
    )
    cache = None
    if train.cache_latents:
        cache = LatentCache.open(
            run / "latents" if train.cache_folder is None else Path(train.cache_folder).expanduser(),
            "train",
            images,
            vae,
            tokenizer,
            None if config.text.pretrained is None else text_encoder,
            validation.batch_size,
            accelerator,
            show,
            replace=train.cache_folder is None,
        )
    input_ids = tokenizer(images.captions) if cache is None else None
    unconditional_context = (
        None
        if cache is None or cache.unconditional_context is None
        else cache.unconditional_context.to(accelerator.device)
    )

    def latents_of(batch: Batch) -> Tensor:
        """A posterior draw of the batch's latents, from the cache or by encoding its images."""
        noise = normal(latent_shape, train.seed, Stream.POSTERIOR, batch["step"], batch["sample_indices"])
        with torch.no_grad():
            if cache is None:
                moments = vae.encode(to_device(batch["pixels"], accelerator.device))
            else:
                moments = to_device(batch["moments"], accelerator.device)
            return vae.sample(moments, to_device(noise, accelerator.device))

    def condition_of(batch: Batch) -> Tensor:
        """What the UNet is told of the batch's captions, some of which are dropped."""
        draws = uniform(train.seed, Stream.CAPTION_DROPOUT, batch["step"], batch["sample_indices"])
        draws = to_device(draws, accelerator.device)
        dropout = caption_dropout_at(batch["step"], train.steps, train.caption_dropout)
        if unconditional_context is not None:
            return drop_captions(to_device(batch["context"], accelerator.device), unconditional_context, dropout, draws)
        ids = batch["input_ids"] if cache is not None else input_ids[batch["index"]]
        return condition(drop_captions(to_device(ids, accelerator.device), unconditional_ids, dropout, draws))

    def noise_of(batch: Batch) -> Tensor:
        """Unit Gaussian noise; with train.offset_noise each channel of it is shifted (Guttenberg 2023)."""
        noise = normal(latent_shape, train.seed, Stream.NOISE, batch["step"], batch["sample_indices"])
        if train.offset_noise:
            shape = (latent_shape[0], 1, 1)
            shift = normal(shape, train.seed, Stream.OFFSET_NOISE, batch["step"], batch["sample_indices"])
            noise = noise + train.offset_noise * shift
        return to_device(noise, accelerator.device)

    if validation.max_images is not None:
        held_out = held_out.some(validation.max_images)
    # As many training images as are held out: if the model is much better on them, it has learned them by heart.
    probes = [images.some(len(held_out)), held_out] if len(held_out) else []
    probes = [(encode_means(vae, probe, validation.batch_size), tokenizer(probe.captions)) for probe in probes]

    def measure(averaged: TextConditionedUNet) -> dict[str, float]:
        """The loss on held-out images by noise level, and how much lower it is on training images."""
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

    open_trackers(config, accelerator, start_step)
    log = MetricsLog(run, start_step, state.pending, accelerator)
    workers = config.data.num_workers if cache is None else 0  # cached data is read faster in this process
    feed = iter(
        loader(images if cache is None else cache, batches, workers, pin_memory=accelerator.device.type == "cuda")
    )
    meter = ThroughputMeter()

    with StopRequest(accelerator) as stop, progress_bar("stage 2", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            signal = stop.agreed()

            if signal is None and state.pending:
                validate = len(held_out) > 0 and due(step, validation.every, train.steps)
                draw = step > 0 and due(step, validation.sample_every, train.steps)
                if validate or draw:
                    with ema.applied(denoiser) as averaged, eval_mode(averaged), accelerator.autocast():
                        if validate:
                            log.write(step, measure(averaged))
                        if draw:
                            samples = generate_validation_images(
                                pipeline_of(averaged),
                                prompts_at(step, validation),
                                validation.seed,
                                config.data.size,
                                validation.batch_size,
                                accelerator,
                            )
                            log.write_image(step, image_grid(samples))
                if power_ema is not None and step > 0 and due(step, config.ema.snapshot_every, train.steps):
                    write_snapshot(run, step, power_ema, accelerator)
                state.pending = False
            if signal is not None or (step > 0 and due(step, config.output.checkpoint_every, train.steps)):
                save_checkpoint(run, state, config.output, accelerator)
            if signal is not None or step == train.steps:
                break
            state.pending = True

            lr = set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                latents, noise, total = latents_of(batch), noise_of(batch), schedule.num_train_timesteps
                timesteps = spread_timesteps(total, train.seed, step, batch["sample_indices"], plan.batch_size)
                timesteps = to_device(timesteps, latents.device)
                with synchronising(accelerator, model, last=turn == plan.accumulation - 1):
                    inputs = condition_of(batch)
                    loss = diffusion_loss(model, schedule, latents, inputs, noise, timesteps, objective).mean()
                    backward(accelerator, loss, 1 / plan.accumulation)
                loss_meter.add([loss], 1 / plan.accumulation)
            grad_norm = clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            apply_gradients(accelerator, optimizer, skip=loss_meter.close(step, grad_norm))
            ema.update(denoiser, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(denoiser, step)

            meter.add(plan.batch_size)
            bar.update()
            if due(step + 1, config.logging.every, train.steps):
                reading = loss_meter.read()
                check_skipped(reading, train.max_skipped_steps, batches, images, run)
                values = {"lr": lr, "images_per_second": meter.read(), "skipped": reading.skipped}
                log.write(step + 1, reading.means | values)
                bar.set_postfix_str(summary(reading, values["images_per_second"]))

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the complete pipeline, with the averaged weights
    if signal is not None:
        stopped(accelerator, run, signal, step, arguments.resume)
        return
    pipeline = pipeline_of(ema.averaged_model(denoiser))
    if accelerator.is_main_process:
        pipeline.save_pretrained(run)
        write_report(run)
        print(f"pipeline in {run}, curves in {run / 'report'}")
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
