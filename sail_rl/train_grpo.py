"""GRPO with verifiable rewards: sample groups, score them, push up what was better than its group.

accelerate launch sail_rl/train_grpo.py recipes/quickstart.yaml [key.sub=value ...]
"""

from functools import partial

from sail_rl.command_line import BadInput, parse_command_line
from sail_rl.config import GrpoRecipe
from sail_rl.heap import use_large_pages
from sail_rl.launch import run_recipe


def train(recipe: GrpoRecipe) -> None:
    """The whole algorithm, top to bottom."""
    # Imported here, so that mistakes in a recipe are answered before torch loads.
    from sail_rl import checkpoint, scoring, stopping
    from sail_rl.audit import log_verdicts
    from sail_rl.batch_form import choose_attention, choose_form
    from sail_rl.compare import compare
    from sail_rl.data.packing import idle_group
    from sail_rl.dynamic_sampling import refill
    from sail_rl.early_scores import begin_scoring
    from sail_rl.engines import make_engine
    from sail_rl.eval import accuracy_now, predictions_once
    from sail_rl.finish import finish_run
    from sail_rl.launch import check_divisible, record_environment, seed_step, start_run
    from sail_rl.memory import update_within_memory
    from sail_rl.metrics import MetricsLog, Stopwatch
    from sail_rl.mini_batches import make_mini_batches
    from sail_rl.model.load import image_token_ids, load_model, prepare_for_training, starting_policy
    from sail_rl.optimizer import make_optimizer, set_learning_rate
    from sail_rl.overlap import Writer
    from sail_rl.parity import check_parity
    from sail_rl.policy import Policy
    from sail_rl.profiling import Profile, written_groups
    from sail_rl.questions import give_curriculum, note_passes, question_stream
    from sail_rl.sampling import tell_filters, training_sampling
    from sail_rl.sharding import prepare
    from sail_rl.skipped import note_skipped
    from sail_rl.transcripts import save_transcript
    from sail_rl.update import make_groups, prompts_apart, update_policy
    from sail_rl.watchdog import watching

    rollout, grpo, trainer = recipe.rollout, recipe.grpo, recipe.trainer
    passing = recipe.data.curriculum.reward if recipe.data.curriculum else None
    keep_all, masked = grpo.trains_without_signal, grpo.mask_truncated_completions

    # The run, its rewards, model and data.
    rewards = scoring.load_rewards(recipe)
    run = start_run(recipe)
    scoring.set_workers(run)
    check_divisible(run, "rollout.prompts_per_step", rollout.prompts_per_step)
    resumed = checkpoint.newest_checkpoint(run)
    policy, processor = load_model(checkpoint.resume_from(recipe.model, resumed), recipe.seed)
    checkpoint.load_adapters_of(resumed, policy)
    stream = question_stream(run, "train", processor)
    eval_stream = question_stream(run, "eval", processor)
    profile = Profile(run, policy)
    suppressed = image_token_ids(policy, processor)
    idle = idle_group(processor, with_picture=run.shard.world_size > 1)

    # Optimizer, engine, and where a resumed run stands.
    prepare_for_training(policy, trainer.gradient_checkpointing)
    attention, apart = choose_attention(run, policy), prompts_apart(run, policy)
    wrapped = Policy(policy, attention, train_entropy=grpo.entropy_coef > 0)
    model, optimizer, whole = prepare(run, wrapped, make_optimizer(policy, recipe.optim))
    record_environment(run, model)
    reference = starting_policy(recipe.model, recipe.seed, model, attention) if grpo.beta else None
    progress = checkpoint.load_progress(run, resumed, optimizer)
    stream.position = progress.data_position
    give_curriculum(run, stream, progress.pass_rates)
    engine = make_engine(run, whole, processor, suppressed)
    engine.load_weights(checkpoint.full_parameters(policy), version=progress.step)
    check_parity(run, whole, engine, stream, suppressed)
    scoring.try_on_data(run, rewards, engine, stream)
    before = predictions_once(run, "before", engine, eval_stream)

    sampling = training_sampling(recipe)
    tell_filters(run)
    watch, form, saver = Stopwatch(), None, checkpoint.Saver(run, whole, processor, optimizer)
    writer = Writer(run, engine, stream, sampling, partial(begin_scoring, run, rewards), watch, profile)
    writer.take_up(progress)
    shown = ["reward", "rewards/accuracy/mean", "completion/length"]
    watched = watching(trainer.stuck_after, run.shard.rank)
    try:
        with MetricsLog(run, shown, progress.step) as log, stopping.waiting(), watched:
            for step in range(progress.step + 1, trainer.max_steps + 1):
                profile.begin(step)
                seed_step(run, step)
                with stopping.given_up_alone(run.shard):
                    batch = writer.next(step)
                    batch, scores, refills = refill(run, rewards, writer, batch, step)
                questions, rollouts = batch.questions, batch.rollouts
                with watch.phase("rollout"):
                    engine.sleep()

                with watch.phase("reward"):
                    outcomes = scoring.gather_outcomes(run.shard, rollouts, scores)
                    failures = scoring.count_failures(run, rewards, progress, outcomes, scores.errors)

                with watch.phase("update"):
                    advantages = compare(recipe, rewards, outcomes)
                    groups = make_groups(questions, rollouts, advantages, run.shard, keep_all, masked)
                    form = form or choose_form(run, whole.model, groups, whole.weights)
                    material = run, groups, outcomes, advantages, idle, form or "padded", apart
                    cut = partial(make_mini_batches, *material)
                    update = partial(update_policy, run, model, reference, optimizer, suppressed=suppressed)
                    learning_rate = set_learning_rate(optimizer, recipe.optim, step, trainer.max_steps)
                    _, figures = update_within_memory(run, optimizer, cut, update)

                turns = batch.data_position - progress.data_position
                progress = progress.after(
                    step=step,
                    data_position=batch.data_position,
                    pass_rates=note_passes(run, stream, questions, scoring.values_of(passing, outcomes)),
                    steps_skipped=note_skipped(run, step, progress, figures),
                    **failures,
                )
                with watch.phase("rollout"):
                    writer.finish()
                    engine.wake()
                    engine.load_weights(checkpoint.full_parameters(policy), version=step)
                seconds = watch.take()
                progress = progress.after(seconds=progress.seconds + sum(seconds.values()))
                utilisation = profile.end(step, seconds, groups, written_groups(questions, rollouts))
                figures |= scoring.reward_figures(outcomes)
                figures |= scoring.group_figures(advantages, outcomes, seconds, keep_all) | {"groups/refills": refills}
                figures |= {"scoring/seconds": batch.scoring.seconds}
                figures["data/passed_over"] = turns - len(advantages.has_signal_P)
                figures |= accuracy_now(run, step, engine, eval_stream) | {"checkpoint/failed_saves": saver.failed}
                log.write(step, figures | utilisation | {"learning_rate": learning_rate})
                if step in (1, trainer.max_steps) or step % trainer.transcript_every == 0:
                    save_transcript(run, step, questions, rollouts, scores, advantages)
                log_verdicts(run, step, questions, rollouts, scores)
                leaving = stopping.asked(run.shard)
                if leaving or step == trainer.max_steps or step % trainer.save_every == 0:
                    saver.save(writer.recorded(progress), figures.get("eval/accuracy"), leaving)
                if leaving:
                    raise stopping.Preempted
    except (BadInput, stopping.GivenUp) as end:
        # A bad row or a failing reward in the middle of a run loses no work: every finished step is kept.
        with stopping.waiting():
            saver.save_after(end, writer.recorded(progress))
        raise
    after = predictions_once(run, "after", engine, eval_stream)
    engine.close()
    scoring.close_rewards(rewards)
    finish_run(run, saver, progress, before, after)


if __name__ == "__main__":
    use_large_pages()
    run_recipe(train, parse_command_line(GrpoRecipe, __doc__))
