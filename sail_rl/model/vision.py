"""Pictures to the language model's embeddings, for the trainer's model and for vLLM's alike.

Suffixes: _N tiles or pictures of one size, _C colours, _HW rows and columns, _T tokens, _D width.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionEmbeddings, Aimv2VisionModel


class AnySizeEmbeddings(Aimv2VisionEmbeddings):
    """AIMv2's patch embeddings for pictures of any size: its table of positions is stretched to their grid."""

    def forward(self, pixel_values_NCHW: torch.Tensor) -> torch.Tensor:
        patches_NDHW = self.patch_embed(pixel_values_NCHW)
        positions_TD = self.positions(*patches_NDHW.shape[-2:])
        return self.rms_norm(patches_NDHW.flatten(2).transpose(1, 2)) + positions_TD

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """One embedding per patch; the table as it is for the size that it was trained at."""
        table_TD = self.position_embedding.weight
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return table_TD
        # In float32, since bfloat16 would move positions of a fine grid onto each other.
        table_1DHW = table_TD.float().T.reshape(1, -1, side, side)
        stretched_1DHW = functional.interpolate(table_1DHW, (rows, columns), mode="bicubic", align_corners=False)
        return stretched_1DHW.flatten(2)[0].T.to(table_TD.dtype)


def any_size_embeddings(tower: Aimv2VisionModel, config: Aimv2VisionConfig) -> Aimv2VisionModel:
    """The tower with embeddings that take any size."""
    tower.embeddings = AnySizeEmbeddings(config)
    return tower


def picture_features(tower, adapter: nn.Module, pixel_values_NCHW: torch.Tensor, ratio: float) -> torch.Tensor:
    """Embeddings [N, T, D] of tiles, or of whole pictures of one size."""
    rows, columns = (side // tower.config.patch_size for side in pixel_values_NCHW.shape[-2:])
    hidden_NTD = tower(pixel_values=pixel_values_NCHW.to(tower.dtype)).last_hidden_state
    return adapter(fold_patches(hidden_NTD.unflatten(1, (rows, columns)), round(1 / ratio)))


def fold_patches(patches_NHWD: torch.Tensor, factor: int) -> torch.Tensor:
    """Fold each block of factor x factor patches into one token: [N, T, D * factor**2], row by row."""
    blocks = patches_NHWD.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def native_features(
    tower, adapter: nn.Module, cells: torch.Tensor, grids: list[list[int]], ratio: float
) -> list[torch.Tensor]:
    """Embeddings [T, D] of each picture at its native size.

    `cells` [tokens, 3, side, side] are the squares of pixels that become one token each; `grids` says for each picture
    how many rows and columns of them it has. Pictures of one size share a pass.
    """
    pictures = [
        part.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        for part, (rows, columns) in zip(cells.split([rows * columns for rows, columns in grids]), grids, strict=True)
    ]
    features: dict[int, torch.Tensor] = {}
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        members = [number for number, picture in enumerate(pictures) if picture.shape == shape]
        batch = torch.stack([pictures[number] for number in members])
        features |= zip(members, picture_features(tower, adapter, batch, ratio), strict=True)
    return [features[number] for number in range(len(pictures))]
