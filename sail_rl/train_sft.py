"""Supervised fine-tuning: imitate the reasoning and the answers of the data.

accelerate launch sail_rl/train_sft.py recipes/quickstart_sft.yaml [key.sub=value ...]
"""

from functools import partial

from sail_rl.command_line import BadInput, parse_command_line
from sail_rl.config import SftRecipe
from sail_rl.heap import use_large_pages
from sail_rl.launch import run_recipe


def train(recipe: SftRecipe) -> None:
    """The whole of it, top to bottom."""
    # Imported here, so that mistakes in a recipe are answered before torch loads.
    from rollouts.hf import HFEngine
    from sail_rl import checkpoint, stopping
    from sail_rl.balance import share_work, work_figures
    from sail_rl.batch import Group
    from sail_rl.batch_form import choose_attention, choose_form
    from sail_rl.data.packing import idle_group, make_batches
    from sail_rl.eval import accuracy_now, predictions_once
    from sail_rl.finish import finish_run
    from sail_rl.launch import check_divisible, record_environment, seed_step, start_run
    from sail_rl.memory import update_within_memory
    from sail_rl.metrics import MetricsLog, Stopwatch
    from sail_rl.model.load import image_token_ids, load_model, prepare_for_training
    from sail_rl.optimizer import make_optimizer, set_learning_rate
    from sail_rl.policy import Policy
    from sail_rl.profiling import Profile
    from sail_rl.questions import question_stream, sample_stream
    from sail_rl.sharding import prepare
    from sail_rl.skipped import note_skipped
    from sail_rl.update_sft import update_supervised
    from sail_rl.watchdog import watching

    sft, trainer = recipe.sft, recipe.trainer

    # The run, its model and data.
    run = start_run(recipe)
    check_divisible(run, "sft.samples_per_step", sft.samples_per_step)
    resumed = checkpoint.newest_checkpoint(run)
    policy, processor = load_model(checkpoint.resume_from(recipe.model, resumed), recipe.seed)
    checkpoint.load_adapters_of(resumed, policy)
    stream = sample_stream(run, processor)
    eval_stream = question_stream(run, "eval", processor)
    profile = Profile(run, policy)
    idle = idle_group(processor, with_picture=run.shard.world_size > 1)

    # Optimizer, and where a resumed run stands.
    prepare_for_training(policy, trainer.gradient_checkpointing)
    attention = choose_attention(run, policy)
    model, optimizer, whole = prepare(run, Policy(policy, attention), make_optimizer(policy, recipe.optim))
    record_environment(run, model)
    progress = checkpoint.load_progress(run, resumed, optimizer)
    stream.position = progress.data_position
    suppressed = image_token_ids(policy, processor)
    engine = HFEngine(whole.model, processor.tokenizer, suppressed, trainer.eval_batch_size, whole.weights)

    watch, form, saver = Stopwatch(), None, checkpoint.Saver(run, whole, processor, optimizer)
    watched = watching(trainer.stuck_after, run.shard.rank)
    try:
        with MetricsLog(run, ["loss", "token_accuracy"], progress.step) as log, stopping.waiting(), watched:
            for step in range(progress.step + 1, trainer.max_steps + 1):
                profile.begin(step)
                seed_step(run, step)
                with watch.phase("data"):
                    samples = stream.next_items(sft.samples_per_step)
                    groups = [Group(sample.prompt, [sample.target_ids], kind=sample.kind) for sample in samples]
                    form = form or choose_form(run, whole.model, groups, whole.weights)
                    groups = share_work(run, groups, form or "padded")
                    cut = partial(make_batches, groups, idle=idle, highest=run.highest, form=form or "padded")

                with watch.phase("update"):
                    learning_rate = set_learning_rate(optimizer, recipe.optim, step, trainer.max_steps)
                    update = partial(update_supervised, run, model, optimizer)
                    batches, figures = update_within_memory(run, optimizer, cut, update)

                seconds = watch.take()
                utilisation = profile.end(step, seconds, groups)
                progress = progress.after(
                    step=step,
                    data_position=stream.position,
                    seconds=progress.seconds + sum(seconds.values()),
                    steps_skipped=note_skipped(run, step, progress, figures),
                )
                figures |= work_figures(run, batches, recipe.update.token_budget)
                figures |= {"learning_rate": learning_rate, "data/bad_rows": len(stream.bad_rows)}
                figures |= {**seconds, **utilisation}
                figures["tokens_per_second"] = figures["tokens/trained"] / sum(seconds.values())
                figures |= accuracy_now(run, step, engine, eval_stream) | {"checkpoint/failed_saves": saver.failed}
                log.write(step, figures)
                leaving = stopping.asked(run.shard)
                if leaving or step == trainer.max_steps or step % trainer.save_every == 0:
                    saver.save(progress, figures.get("eval/accuracy"), leaving)
                if leaving:
                    raise stopping.Preempted
    except BadInput as end:
        # A bad row in the middle of a run loses no work: every finished step is kept.
        with stopping.waiting():
            saver.save_after(end, progress)
        raise
    finish_run(run, saver, progress, [], predictions_once(run, "after", engine, eval_stream))


if __name__ == "__main__":
    use_large_pages()
    run_recipe(train, parse_command_line(SftRecipe, __doc__))
