"""Stage 2: train the text-conditioned UNet on the latents of stage 1.

python train_unet.py configs/demo/unet.yaml [section.key=value ...] [--resume latest|never|FOLDER]
accelerate launch train_unet.py configs/demo/unet.yaml

Writes saved/<run>/: config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the complete pipeline in the
diffusers layout. The same command again continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data import Batch, StepBatches, loader, open_pictures
from latentdiff.diffusion import NoiseSchedule, drop_captions
from latentdiff.formats.diffusers_folder import write_png
from latentdiff.latent_cache import LatentCache, encode_means
from latentdiff.models.denoiser import Denoiser
from latentdiff.models.modes import evaluating
from latentdiff.models.text import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline
from latentdiff.training import loop, setup
from latentdiff.training.arguments import parse_arguments, run_as_command
from latentdiff.training.checkpoint import TrainingState, resume, save_checkpoint
from latentdiff.training.ema import EMA
from latentdiff.training.logging import Meter, MetricsLog, picture_grid, progress_bar
from latentdiff.training.randomness import Purpose, normal, seed_for, spread_timesteps, uniform
from latentdiff.training.schedules import ema_decay_at, learning_rate_at
from latentdiff.training.validation import validation_loss


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    arguments = parse_arguments(arguments, "Train the text-conditioned UNet (stage 2).")
    config = load_config(UNetTrainingConfig, arguments.config, arguments.overrides)
    train = config.train
    schedule = NoiseSchedule(**config.diffusion.model_dump(exclude={"caption_dropout"}))
    vae = setup.open_vae(config)
    accelerator, plan = setup.start(train)
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
    validation = config.validation
    defaults = GenerationDefaults(validation.num_inference_steps, validation.guidance_scale, validation.sampler)
    pipeline = LatentDiffusionPipeline(vae, unet, text_encoder, tokenizer, schedule, defaults)
    accelerator.print(setup.describe(denoiser))

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = setup.build_optimizer(denoiser, config.optimizer)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMA(denoiser)

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    run = Path(config.output.folder).expanduser()
    settings = setup.settings(model=config.model, text=config.text, prediction_type=schedule.prediction_type)
    state = TrainingState(denoiser, ema, optimizer, settings)
    resumed = resume(run, state, arguments.resume, accelerator)
    start_step = state.step
    setup.record(config, run, accelerator)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    batches = StepBatches(len(pictures), plan, accelerator.process_index, train.seed, start_step, train.steps)
    input_ids = tokenizer(pictures.captions).to(accelerator.device)
    empty_ids = tokenizer([""])[0].to(accelerator.device)
    cache = LatentCache.encode(vae, pictures, validation.batch_size, show) if train.cache_latents else None
    held_out_latents = encode_means(vae, held_out, validation.batch_size)
    held_out_ids = tokenizer(held_out.captions).to(accelerator.device)

    def condition(ids: Tensor) -> Tensor:
        """input_ids themselves if the text encoder is trained along, else the frozen encoder's context."""
        if denoiser.text_encoder is not None:
            return ids
        with torch.no_grad():
            return text_encoder(ids)

    def latents_of(batch: Batch) -> Tensor:
        """A posterior draw of the batch's latents, from the cache or by encoding its pictures."""
        with torch.no_grad():
            if cache is None:
                moments = vae.encode(batch["pixels"].to(accelerator.device, non_blocking=True))
            else:
                moments = batch["moments"].to(accelerator.device, non_blocking=True)
            noise = normal(latent_shape, train.seed, Purpose.POSTERIOR, batch["step"], batch["slots"])
            return vae.sample(moments, noise.to(moments))

    log = MetricsLog(run, start_step, accelerator.is_main_process)
    workers = config.data.num_workers if cache is None else 0  # cached data is read faster in this process
    feed = iter(
        loader(pictures if cache is None else cache, batches, workers, pin_memory=accelerator.device.type == "cuda")
    )
    latent_shape = (config.model.in_channels, *2 * (config.data.size // vae.config.downsampling,))
    sums = torch.zeros(1, device=accelerator.device)  # loss since the last line of the log
    meter, logged = Meter(), start_step

    with progress_bar("stage 2", start_step, train.steps, show) as bar:
        for step in range(start_step, train.steps + 1):
            state.step = step
            fresh = step > start_step or not resumed  # what is due at the step of a resume has been done before it

            validate = fresh and len(held_out) > 0 and loop.due(step, validation.every, train.steps)
            draw = fresh and step > 0 and loop.due(step, validation.sample_every, train.steps)
            if (validate or draw) and accelerator.is_main_process:
                with ema.applied(denoiser), evaluating(denoiser), accelerator.autocast():
                    if validate:
                        loss = validation_loss(
                            denoiser,
                            schedule,
                            held_out_latents,
                            lambda indices: condition(held_out_ids[indices]),
                            validation.batch_size,
                        )
                        log.write(step, **{"validation/loss": loss})
                    if draw:
                        images = pipeline(
                            validation.prompts,
                            seed=validation.seed,
                            height=config.data.size,
                            width=config.data.size,
                            progress=False,
                        ).images
                        write_png(picture_grid(images), run / "samples" / f"step_{step:08d}.png")
            if fresh and step > 0 and loop.due(step, config.output.checkpoint_every, train.steps):
                save_checkpoint(run, state, config.output.keep, accelerator)
            if step == train.steps:
                break

            lr = loop.set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for turn in range(plan.accumulation):
                batch = next(feed)
                assert batch["step"] == step
                slots = batch["slots"]
                latents = latents_of(batch)
                noise = normal(latent_shape, train.seed, Purpose.NOISE, step, slots)
                total = schedule.num_train_timesteps
                timesteps = spread_timesteps(total, train.seed, step, slots, plan.batch_size)
                draws = uniform(train.seed, Purpose.CAPTION_DROPOUT, step, slots).to(accelerator.device)
                ids = drop_captions(input_ids[batch["index"]], empty_ids, config.diffusion.caption_dropout, draws)
                with loop.synchronising(accelerator, model, last=turn == plan.accumulation - 1):
                    loss = schedule.loss(
                        model, latents, condition(ids), noise.to(latents), timesteps.to(latents.device)
                    ).mean()
                    accelerator.backward(loss / plan.accumulation)
                sums += loss.detach() / plan.accumulation
            grad_norm = loop.clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(denoiser, ema_decay_at(step, train.ema_decay))

            meter.add(plan.batch_size)
            bar.update()
            if loop.due(step + 1, config.logging.every, train.steps):
                (loss,) = loop.mean_over_processes(accelerator, sums / (step + 1 - logged))
                loop.check_finite(loss, step + 1, run)
                rate = meter.read()
                log.write(step + 1, loss=loss, grad_norm=float(grad_norm), lr=lr, images_per_second=rate)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")
                sums.zero_()
                logged = step + 1

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the complete pipeline, with the averaged weights
    ema.copy_to(denoiser)
    if accelerator.is_main_process:
        pipeline.save_pretrained(run)
        print(f"pipeline in {run}")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_as_command(main)
