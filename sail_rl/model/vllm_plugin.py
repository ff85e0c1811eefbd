"""What vLLM runs in each of its processes (entry point `vllm.general_plugins`): it makes SAIL-VL2 known to it."""


def register() -> None:
    """Register the configurations and, by name, the model: vLLM imports it when a checkpoint asks for it."""
    from vllm import ModelRegistry

    import sail_rl.model  # noqa: F401  (registers SAIL-VL2 with the Auto classes)

    ModelRegistry.register_model(
        "SailVL2ForConditionalGeneration", "sail_rl.model.vllm_model:SailVL2ForConditionalGeneration"
    )
