"""SAIL-VL2 for transformers. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from sail_rl.model.configuration_sail_vl2 import SailVL2Config
from sail_rl.model.modeling_sail_vl2 import SailVL2ForConditionalGeneration, SailVL2Model
from sail_rl.model.processing_sail_vl2 import SailVL2ImageProcessor, SailVL2Processor
from sail_rl.model.released_config import SailVLConfig
from sail_rl.model.released_loading import register as register_released_names

AutoConfig.register(SailVL2Config.model_type, SailVL2Config, exist_ok=True)
AutoModelForImageTextToText.register(SailVL2Config, SailVL2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SailVL2Config, SailVL2Processor, exist_ok=True)
# One image processor under both names, so that transformers has no choice to make between them.
AutoImageProcessor.register(
    SailVL2Config,
    image_processor_classes={"pil": SailVL2ImageProcessor, "torchvision": SailVL2ImageProcessor},
    exist_ok=True,
)

# Folders in the released layout.
AutoConfig.register(SailVLConfig.model_type, SailVLConfig, exist_ok=True)
register_released_names()

__all__ = ["SailVL2Config", "SailVL2ForConditionalGeneration", "SailVL2Model", "SailVL2Processor"]
