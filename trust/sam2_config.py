"""SAM2's config files."""
from pathlib import Path

import hydra
import sam2
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trust.errors import BadInput, one_line

# What SAM2's own video predictor adds to its configs. A config's own values win. The predictor's filling of
# holes is left out, because it needs a compiled extension.
PREDICTOR = {
    "binarize_mask_from_pts_for_mem_enc": True,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
# Sizes in the names of published weights, and in those of their configs.
SIZES = {"_tiny": "_t", "_small": "_s", "_base_plus": "_b+", "_large": "_l"}


def build_sam2(config):
    """The model of a SAM2 config (see Tracker.from_pretrained), random weights, evaluation mode."""
    package = Path(sam2.__file__).parent
    places = Path(config), package / config, package / f"configs/sam2.1/{config}.yaml"
    files = [path for path in places if path.is_file()]
    if not files:
        known = ", ".join(sorted(path.stem for path in package.glob("configs/sam2.1/*.yaml")))
        raise FileNotFoundError(f"no such SAM2 config: {config} (a yaml file, or one of: {known})")
    try:
        settings = OmegaConf.merge(PREDICTOR, OmegaConf.load(files[0]).model)
        settings["_target_"] = "sam2.sam2_video_predictor.SAM2VideoPredictor"
        return hydra.utils.instantiate(settings).eval()
    except (yaml.YAMLError, OmegaConfBaseException, HydraException, ValueError) as error:
        message = f"not a SAM2 config, a yaml with the key model: {files[0]} ({one_line(error)})"
        raise BadInput(message) from None


def find_config(weights) -> str:
    """The config that belongs to a file of weights: the config.yaml beside it, else by its published name.

    sam2.1_hiera_large.pt belongs to sam2.1_hiera_l.
    """
    beside = Path(weights).parent / "config.yaml"
    if beside.is_file():
        return str(beside)
    name = Path(weights).stem
    for size, letter in SIZES.items():
        if name.endswith(size):
            return name.removesuffix(size) + letter
    return name
