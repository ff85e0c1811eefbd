"""How the recipe has completions drawn, for engines and trainer alike."""

from rollouts import Filters, Sampling
from sail_rl.config import GrpoRecipe, RolloutSection, SftRecipe
from sail_rl.launch import Run


def training_sampling(recipe: GrpoRecipe) -> Sampling:
    """Of the completions that are trained on."""
    rollout = recipe.rollout
    seed = recipe.seed if rollout.seed is None else rollout.seed
    length, temperature = rollout.max_completion_length, rollout.temperature
    return Sampling(length, temperature, seed, filters_of(rollout), tuple(rollout.stop))


def greedy_sampling(recipe: GrpoRecipe | SftRecipe) -> Sampling:
    """Of evaluations: the model itself, without filters, which ends where completions of the training end."""
    if isinstance(recipe, SftRecipe):
        return Sampling(recipe.sft.max_completion_length, temperature=0.0)
    return Sampling(recipe.rollout.max_completion_length, temperature=0.0, stop=tuple(recipe.rollout.stop))


def filters_of(rollout: RolloutSection) -> Filters:
    """What changes the distribution beside the temperature."""
    return Filters(rollout.repetition_penalty, rollout.min_p, rollout.top_k, rollout.top_p)


def tell_filters(run: Run) -> None:
    """Say what the filters do to the training, if there are any."""
    rollout = run.recipe.rollout
    cutting = {"top_p": rollout.top_p < 1, "top_k": rollout.top_k > 0, "min_p": rollout.min_p > 0}
    cut = [f"rollout.{key} = {getattr(rollout, key):g}" for key, on in cutting.items() if on]
    if cut and run.is_main:
        print(f"sampling is cut ({', '.join(cut)}): log-probabilities are of the tokens left, others have no gradient")
    if rollout.repetition_penalty != 1 and run.is_main:
        print(f"rollout.repetition_penalty = {rollout.repetition_penalty:g}: the policy that is trained is penalised")
