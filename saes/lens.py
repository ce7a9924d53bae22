"""All that this room uses of SAELens, imported in one place, and the names both sides give to places in a model."""

from __future__ import annotations

import re

from emocircuits.activations.sites import Key
from emocircuits.errors import InputError, MissingPackageError

try:
    from sae_lens import SAE, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
except ImportError as error:
    raise MissingPackageError('sparse autoencoders need SAELens; run: pip install "emocircuits[sae]"') from error

__all__ = [
    "SAE", "SAEMetadata", "SAETrainer", "SAETrainerConfig", "TopKTrainingSAE", "TopKTrainingSAEConfig",
    "TrainStepInput", "TrainStepOutput", "TrainingSAE", "TrainingSAEConfig", "get_sae_training_class", "hook_name",
    "parse_hook",
]  # fmt: skip

HOOKS = {
    **{site: f"hook_{site}" for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{site: f"attn.hook_{site}" for site in ("q", "k", "v", "z")},
    "mlp_post": "mlp.hook_post",
}
_SITES = {hook: site for site, hook in HOOKS.items()}


def hook_name(key: Key) -> str:
    """TransformerLens's name of a (site, layer), as SAELens keeps it in an autoencoder's metadata."""
    site, layer = key
    if site not in HOOKS:
        raise InputError(f"an autoencoder cannot sit at {site!r}; choose from {', '.join(HOOKS)}")
    return f"blocks.{layer}.{HOOKS[site]}"


def parse_hook(name: str | None) -> Key:
    """The (site, layer) of a TransformerLens hook name. Raises InputError for names of other places, or none."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name or "")
    if found is None or found[2] not in _SITES:
        raise InputError(f"the hook {name!r} names no place that can be read here; give the (site, layer) yourself")
    return _SITES[found[2]], int(found[1])
