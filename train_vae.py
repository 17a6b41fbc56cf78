"""Stage 1: train the autoencoder.

python train_vae.py configs/demo/vae.yaml [section.key=value ...] [--resume latest|never|FOLDER] [--explain]
accelerate launch --multi_gpu train_vae.py configs/demo/vae.yaml

Writes saved/<run>/: index.html (the run's page), config.yaml, metrics.jsonl, samples/, checkpoints/, and at the end the
diffusers folder of the autoencoder with its measured latent scale. Run the same command again to resume.
"""

if __name__ == "__main__":
    from latentdiff.training.arguments import answer_help

    answer_help("vae")

from collections.abc import Sequence

from accelerate import Accelerator

from latentdiff.config import VAETrainingConfig, load_config
from latentdiff.data.batches import BatchPlan
from latentdiff.data.captioned_images import describe_images, open_run_images
from latentdiff.evaluation.autoencoder import Thresholds, evaluate_run
from latentdiff.freed_memory import freed_memory_kept
from latentdiff.models.eval_mode import eval_mode
from latentdiff.training.accelerator import fit_micro_batch, start_accelerator
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
from latentdiff.training.vae_evaluation import reconstruction_grid, validate_vae
from latentdiff.training.vae_inputs import VAEInputs
from latentdiff.training.vae_model import initial_autoencoder, scale_latents
from latentdiff.training.vae_objective import VAEObjective


def main(arguments: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Config
    options = parse_arguments(arguments, "vae")
    config = load_config(VAETrainingConfig, options.config, options.overrides)
    accelerator, plan = start_accelerator(config)
    with owned(config, accelerator), freed_memory_kept(accelerator.device):
        command = ["train_vae.py", options.config, *options.overrides]
        run_stage(config, options.resume, accelerator, plan, command)


def run_stage(
    config: VAETrainingConfig,
    resume_from: str,
    accelerator: Accelerator,
    plan: BatchPlan,
    command: Sequence[str] = (),
) -> None:
    """Train in the run's folder, which is ours alone.

    resume_from: latest, never or a checkpoint folder. command: what the model card says how it was trained.
    """
    train, validation = config.train, config.validation
    show = config.logging.progress and accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------------------
    # Data
    images, held_out = open_run_images(config, config.model, progress=show)
    accelerator.print(describe_images(images, held_out, train.batch_size))

    # ------------------------------------------------------------------------------------------------------------------
    # Model
    vae = initial_autoencoder(config)
    vae.enable_gradient_checkpointing(train.gradient_checkpointing)
    vae.to(accelerator.device)
    vae.to(memory_format=memory_format(train, accelerator.device))
    accelerator.print(describe(vae))
    inputs = VAEInputs(config, accelerator.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Optimiser
    optimizer = build_optimizer(vae, config.optimizer)
    full_copy = make_full_copy(vae, accelerator)
    model, optimizer = prepare(accelerator, vae, optimizer, train)
    ema = EMA(vae, full_copy)
    power_ema = PowerEMA(vae, config.ema.snapshot_lengths) if config.ema.snapshot_every else None
    best = BestWeights("held-out MSE") if config.publishes_best and len(held_out) else None
    objective = VAEObjective(config, vae, accelerator, images.layout.smallest_side)
    if train.micro_batch_size == "auto":
        largest = images.layout.largest
        plan = fit_micro_batch(accelerator, plan, model, lambda n: objective.trial(model, *inputs.blank(n, largest)))

    # ------------------------------------------------------------------------------------------------------------------
    # Resume
    loss_meter = LossMeter(objective.names, accelerator)
    settings = model_settings(model=config.model, freeze_encoder=config.freeze_encoder)
    state = TrainingState(
        vae, ema, optimizer, settings, config.model_dump(mode="json"), power_ema, loss_meter, objective.trained, best
    )
    if accelerator.is_main_process:
        state.data = DataRecord.of(images, held_out, {"encoder": vae.encoder} if config.freeze_encoder else {})
    run = Run(config, state, resume_from, accelerator, "stage 1", show)
    if run.finished:
        return
    run.flops_of_image = flops_by_step(config, config.model)
    run.show_images(images, held_out)

    # ------------------------------------------------------------------------------------------------------------------
    # Loop
    batches = run.micro_batches(images, images, plan, config.data.num_workers)
    shown = (held_out if len(held_out) else images).first(validation.images)
    weight = 1 / plan.accumulation

    def evaluate(step: int) -> None:
        if not run.due(validation.every):
            return
        with ema.applied(vae) as averaged, eval_mode(averaged):
            if len(held_out):
                scores = validate_vae(averaged, held_out, validation.batch_size, accelerator)
                run.log.write(step, {f"validation/{key}": value for key, value in scores.items()})
                if best is not None and step >= config.loss.complete_at:
                    best.offer(step, scores["mse"], averaged)
            if accelerator.is_main_process:
                run.log.write_image(step, reconstruction_grid(averaged, shown))

    with run:
        for step in run.steps(evaluate):
            lr = set_learning_rate(optimizer, learning_rate_at(step, train.steps, config.optimizer))
            for micro_step in range(plan.accumulation):
                last = micro_step == plan.accumulation - 1
                pixels, noise = inputs(next(batches))
                with synchronising(accelerator, model, last):
                    reconstruction, moments = model(pixels, noise)
                    terms = objective(pixels, reconstruction, moments, step, weight)  # scalars
                    backward(accelerator, terms["loss"], weight)
                terms |= objective.learn(pixels, reconstruction, step, weight, last=last)
                loss_meter.add(terms, weight)
            grad_norm = clip_gradients(accelerator, model, config.optimizer.max_grad_norm)
            # A gradient that is not finite in one of the networks skips the step of all.
            skip = loss_meter.close(step, grad_norm, *objective.clip(step))
            apply_gradients(accelerator, optimizer, skip)
            objective.step(step, lr, skip)
            ema.update(vae, ema_decay_at(step, config.ema.decay))
            if power_ema is not None:
                power_ema.update(vae, step)
            run.report(step, plan.batch_size, {"lr": lr}, objective.values)

    # ------------------------------------------------------------------------------------------------------------------
    # Finish: the averaged weights of the best or the last step; their latent scale, over the whole training set
    if run.stopped is not None:
        run.end_stopped()
        return
    run.choose_weights()
    vae = ema.averaged_model(vae).eval()
    own = images.batches(validation.batch_size, accelerator.process_index, accelerator.num_processes)
    scale_latents(vae, config, own, accelerator)
    if accelerator.is_main_process:
        vae.save_pretrained(run.folder)
        evaluation = evaluate_run(
            run.folder,
            Thresholds(),
            batch_size=validation.batch_size,
            device=str(accelerator.device),
            progress=show,
        )
        print(evaluation.text())
        write_report(run.folder)
        print(write_card(run.folder, state.data, command))
        print(f"autoencoder in {run.folder}, curves in {run.folder / 'report'}")
        run.finish()
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(main)
