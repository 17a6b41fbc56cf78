"""Stage 2: train the text-conditioned UNet on the latents of stage 1, or on the images themselves.

python train_unet.py configs/demo/unet.yaml [section.key=value ...] [--resume latest|never|FOLDER] [--explain]
accelerate launch --multi_gpu train_unet.py configs/demo/unet.yaml

Writes saved/<run>/: index.html (the run's page), config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the
complete pipeline in the diffusers layout. Run the same command again to resume.
"""

if __name__ == "__main__":
    from latentdiff.training.arguments import answer_help

    answer_help("unet")

from collections.abc import Sequence
from functools import partial

from accelerate import Accelerator
from torch import nn

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.batches import BatchPlan
from latentdiff.data.captioned_images import describe_images, open_run_images
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.freed_memory import freed_memory_kept
from latentdiff.models.initial_model import with_initial_model
from latentdiff.models.pretrained_text import PretrainedTextEncoder
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.accelerator import fit_micro_batch, start_accelerator
from latentdiff.training.adapters import save_adapters, trained_network
from latentdiff.training.arguments import parse_arguments, run_as_command
from latentdiff.training.best_weights import BestWeights
from latentdiff.training.checkpoint import TrainingState
from latentdiff.training.computing import memory_format, prepare
from latentdiff.training.data_record import DataRecord
from latentdiff.training.ema import EMA, ema_decay_at, make_full_copy
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.model_card import write_card
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    synchronising,
)
from latentdiff.training.plan import flops_by_step
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.report import write_report
from latentdiff.training.run import Run, describe, model_settings
from latentdiff.training.run_folder import owned
from latentdiff.training.unet_evaluation import UNetEvaluation
from latentdiff.training.unet_inputs import UNetInputs
from latentdiff.training.unet_model import (
    build_text_encoder,
    build_tokenizer,
    for_text_encoder,
    generation_defaults,
    open_latent_space,
    start_from,
    trained_on,
)
from latentdiff.training.used_rows import UsedRows


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    options = parse_arguments(arguments, "unet")
    config = load_config(UNetTrainingConfig, options.config, options.overrides, with_initial_model)
    accelerator, plan = start_accelerator(config)
    with owned(config, accelerator), freed_memory_kept(accelerator.device):
        command = ["train_unet.py", options.config, *options.overrides]
        run_stage(config, options.resume, accelerator, plan, command)


def run_stage(
    config: UNetTrainingConfig,
    resume_from: str,
    accelerator: Accelerator,
    plan: BatchPlan,
    command: Sequence[str] = (),
) -> None:
    """Train in the run's folder, which is ours alone.

    resume_from: latest, never or a checkpoint folder. command: what the model card says how it was trained.
    """
    train, schedule = config.train, config.diffusion
    config, vae = open_latent_space(config)
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    images, held_out = open_run_images(config, vae.config, progress=show)
    accelerator.print(describe_images(images, held_out, train.batch_size))
    vae.to(accelerator.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    text_encoder = build_text_encoder(config.text, seed_for(train.seed, Stream.TEXT_INIT)).to(accelerator.device)
    config = for_text_encoder(config, text_encoder)
    tokenizer = build_tokenizer(config.text, text_encoder)
    if isinstance(text_encoder, PretrainedTextEncoder):
        accelerator.print(f"text encoder {text_encoder.class_name}: Stable Diffusion tools cannot open this model")
    unet = UNet.from_config(config.model, seed_for(train.seed, Stream.INIT))
    for line in start_from(config, vae, unet, text_encoder):
        accelerator.print(line)
    unet.enable_gradient_checkpointing(train.gradient_checkpointing)
    frozen: dict[str, nn.Module] = {} if config.is_pixel_space else {"autoencoder": vae}
    if config.text.pretrained is not None:
        frozen["text encoder"] = text_encoder
    if config.trains_adapters:
        frozen["UNet"] = unet
    record = DataRecord.of(images, held_out, frozen) if accelerator.is_main_process else None
    network = trained_network(config, unet, text_encoder).to(accelerator.device)
    network.to(memory_format=memory_format(train, accelerator.device))
    accelerator.print(describe(network))
    inputs = UNetInputs(config, vae, tokenizer, text_encoder, accelerator)
    defaults = generation_defaults(config.validation)
    seen = trained_on(config, images.distinct_captions)
    defaults.levels(schedule)  # fail before training if the sampler cannot make that many steps

    def pipeline_of(averaged: TextConditionedUNet) -> LatentDiffusionPipeline:
        text = averaged.text_encoder or text_encoder
        return LatentDiffusionPipeline(vae, averaged.unet, text, tokenizer, schedule, defaults, trained_on=seen)

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = build_optimizer(network, config.optimizer)
    full_copy = make_full_copy(network, accelerator)
    model, optimizer = prepare(accelerator, network, optimizer, train)
    ema = EMA(network, full_copy)
    power_ema = PowerEMA(network, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    averages = [ema.average, *(power_ema.averages.values() if power_ema is not None else ())]
    used_rows = UsedRows(network, optimizer, averages, accelerator)
    best = BestWeights("validation loss") if config.publishes_best and len(held_out) else None
    if train.micro_batch_size == "auto":
        blank = partial(inputs.blank, shape=images.layout.largest)
        plan = fit_micro_batch(
            accelerator, plan, model, lambda n: diffusion_loss(model, schedule, *blank(n), config.loss).mean()
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    loss_meter = LossMeter(["loss"], accelerator)
    settings = model_settings(
        model=config.model,
        text=None if config.trains_adapters else config.text,  # that of init_from, wherever it is now
        prediction_type=schedule.prediction_type,
        latent_space="pixels" if config.is_pixel_space else "autoencoder",
        lora=config.lora,
    )
    state = TrainingState(
        network,
        ema,
        optimizer,
        settings,
        config.model_dump(mode="json"),
        power_ema,
        loss_meter,
        best=best,
        data=record,
        trained_only=config.trains_adapters,
    )
    run = Run(config, state, resume_from, accelerator, "stage 2", show)
    if run.finished:
        return
    run.flops_of_image = flops_by_step(config, vae.config)
    run.show_images(images, held_out)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    data = inputs.open(images, run.folder, show)
    evaluation = UNetEvaluation(config, inputs, images, held_out, pipeline_of, accelerator)
    # Cached latents are read faster in this process.
    batches = run.micro_batches(data, images, plan, 0 if train.cache_latents else config.data.num_workers)
    weight = 1 / plan.accumulation

    with run:
        for step in run.steps(lambda step: evaluation(run, ema, network)):
            lr = set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for micro_step in range(plan.accumulation):
                latents, condition, noise, timesteps = inputs(next(batches))
                used_rows.add(condition)
                with synchronising(accelerator, model, last=micro_step == plan.accumulation - 1):
                    losses = diffusion_loss(model, schedule, latents, condition, noise, timesteps, config.loss)  # [b]
                    backward(accelerator, losses.mean(), weight)
                loss_meter.add({"loss": losses.mean()}, weight)
            grad_norm = clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            skip = loss_meter.close(step, grad_norm)
            with used_rows.only():
                apply_gradients(accelerator, optimizer, skip)
                ema.update(network, ema_decay_at(step, config.ema.decay))
                if power_ema is not None:
                    power_ema.update(network, step)
            run.report(step, plan.batch_size, {"lr": lr})

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the complete pipeline, with the averaged weights of the best or the last step
    if run.stopped is not None:
        run.end_stopped()
        return
    run.choose_weights()
    averaged = ema.averaged_model(network)
    if accelerator.is_main_process:
        if config.trains_adapters:
            save_adapters(config, averaged, run.folder)
            seen.save(run.folder)
        else:
            pipeline_of(averaged).save_pretrained(run.folder)
        write_report(run.folder)
        print(write_card(run.folder, state.data, command))
        print(f"{'LoRA' if config.trains_adapters else 'pipeline'} in {run.folder}, curves in {run.folder / 'report'}")
        run.finish()
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
