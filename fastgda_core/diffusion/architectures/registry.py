"""The architectures that are known: one file each, and its line here."""

from __future__ import annotations

from fastgda_core.diffusion.architectures import dit, flux, pixart, sana, sd3, unet

ARCHITECTURES = {module.ARCHITECTURE.denoiser: module.ARCHITECTURE for module in (unet, pixart, sd3, dit, flux, sana)}
