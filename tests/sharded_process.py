"""One of several processes with a sharded model: are the weights that an engine is given those from before?

python tests/sharded_process.py CHECKPOINT WITH_ADAPTERS OUTPUT_DIR, by a launcher
"""

import sys

import torch

from sail_rl.checkpoint import full_parameters
from sail_rl.command_line import load_recipe
from sail_rl.config import SftRecipe
from sail_rl.launch import start_run
from sail_rl.model.load import load_model
from sail_rl.model.lora import lora_layers
from sail_rl.optimizer import make_optimizer
from sail_rl.policy import Policy
from sail_rl.sharding import prepare


def main(start: str, adapters: str, output: str) -> None:
    """Wrap a model and compare; its parts on this process are smaller than the whole, save for ZeRO-2."""
    lora = ", lora: {parts: [llm, tower]}" if adapters == "True" else ""
    overrides = [f"model={{path: {start}{lora}}}", f"output_dir={output}"]
    recipe = load_recipe(SftRecipe, "recipes/quickstart_sft.yaml", overrides)
    run = start_run(recipe)
    model, _ = load_model(recipe.model, seed=0)
    for _, layer in lora_layers(model):
        layer.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in full_parameters(model)}
    _, _, whole = prepare(run, Policy(model), make_optimizer(model, recipe.optim))
    for _ in range(2):
        after = {name: tensor.clone() for name, tensor in full_parameters(model)}
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    with whole.weights():
        filled = dict(full_parameters(whole.model))
        assert all(torch.equal(filled[name], tensor) for name, tensor in before.items())
    print("all weights are whole", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
