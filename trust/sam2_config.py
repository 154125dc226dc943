"""SAM2's config files. hydra calls whatever a config names, so what it may name is checked before."""
import math
from contextlib import contextmanager
from pathlib import Path

import hydra
import yaml
from omegaconf import OmegaConf
from torch.nn.modules.module import register_module_parameter_registration_hook

from trust.errors import BadInput, one_line
from trust.files import check_file
from trust.options import sam2_config_file

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

# ---- what a config may say -------------------------------------------------------------------------
# The classes of all published configs. A prefix would not do: sam2.modeling.sam2_base.torch.load is a name,
# too.
TARGETS = (
    "sam2.modeling.backbones.hieradet.Hiera",
    "sam2.modeling.backbones.image_encoder.FpnNeck",
    "sam2.modeling.backbones.image_encoder.ImageEncoder",
    "sam2.modeling.memory_attention.MemoryAttention",
    "sam2.modeling.memory_attention.MemoryAttentionLayer",
    "sam2.modeling.memory_encoder.CXBlock",
    "sam2.modeling.memory_encoder.Fuser",
    "sam2.modeling.memory_encoder.MaskDownSampler",
    "sam2.modeling.memory_encoder.MemoryEncoder",
    "sam2.modeling.position_encoding.PositionEmbeddingSine",
    "sam2.modeling.sam.transformer.RoPEAttention",
    "sam2.modeling.sam2_base.SAM2Base",
)
VIDEO_PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"
# Keys by which hydra does more than call a class with named values. Hiera reads the file at its weights_path.
REFUSED = ("_args_", "_convert_", "_partial_", "_recursive_", "weights_path")
LARGEST_CONFIG = 20_000    # bytes; published ones have 4 kB
MOST_BRACKETS = 500        # yaml's time grows with the square of how many are open
# Largest whole numbers, others MOST. In the published configs they are several times smaller.
MOST = 4096
MOST_OF = dict(stages=200, num_layers=200, feat_sizes=256, temperature=1_000_000, dim_feedforward=1 << 14)
# Numbers of all weights; the large model has 2.2e8.
MOST_WEIGHTS = 2e9
# Pixels of which SAM2's deepest features have one, along a side.
DEEPEST = 32


def build_sam2(config):
    """The model of a SAM2 config (see Tracker.from_pretrained), random weights, evaluation mode.

    Raises FileNotFoundError or BadInput, naming the file.
    """
    file = sam2_config_file(config)
    settings = read_settings(file)
    with describing(file), at_most(MOST_WEIGHTS):
        return hydra.utils.instantiate(settings).eval()


@contextmanager
def describing(file):
    """Turns any error inside into a BadInput that says what a config is."""
    try:
        yield
    except Exception as error:
        message = f"not a SAM2 config, a yaml with the key model: {file} ({one_line(error, most=240)})"
        raise BadInput(message) from None


def read_settings(file):
    """What hydra instantiates. Raises BadInput where a config could do anything but describe a SAM2."""
    check_file(file)
    if file.stat().st_size > LARGEST_CONFIG:
        raise BadInput(f"{file} is too large for a SAM2 config")
    with describing(file):
        text = file.read_bytes()
        if text.count(b"[") + text.count(b"{") > MOST_BRACKETS:
            raise ValueError("it has too many brackets")
        # A few lines of aliases that repeat each other would fill the memory.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases")
        whole = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        model = whole["model"]
        check_node(model)
        settings = OmegaConf.merge(PREDICTOR, model)
        check_size(settings)
    settings["_target_"] = VIDEO_PREDICTOR
    return settings


def check_node(value, key=""):
    """Raises ValueError where a value, or one inside it, is none of a SAM2 config. key: under which it is."""
    if key == "_target_":
        if value not in TARGETS:
            raise ValueError(f"_target_ {value} is no part of SAM2")
    elif isinstance(value, dict):
        for name, inside in value.items():
            if name in REFUSED:
                raise ValueError(f"{name} is not allowed")
            check_node(inside, name)
    elif isinstance(value, list):
        for inside in value:
            check_node(inside, key)
    elif isinstance(value, str) and "${" in value:
        raise ValueError(f"{key} {value} stands for something else")
    elif isinstance(value, float) and not abs(value) <= 1e9:
        raise ValueError(f"{key} is {value}")
    elif isinstance(value, int) and abs(value) > MOST_OF.get(key, MOST):
        raise ValueError(f"{key} is {value}, at most {MOST_OF.get(key, MOST)}")


def check_size(settings):
    """Raises ValueError where the side of the picture that SAM2 sees does not fit its features."""
    side = settings.get("image_size", 512)
    window = settings.image_encoder.trunk.get("window_spec", [8])[0]
    # Four pixels are a place of the first features, and windows are laid over them.
    step = math.lcm(DEEPEST, 4 * window)
    if type(side) is not int or side < step or side % step:
        raise ValueError(f"image_size is {side}, but must be a multiple of {step}")
    if settings.get("backbone_stride", 16) != 16:
        raise ValueError(f"backbone_stride is {settings.backbone_stride}, but must be 16")


@contextmanager
def at_most(count):
    """Inside, modules are made of at most so many numbers. ValueError before more are filled."""
    made = 0

    def add(module, name, parameter):
        nonlocal made
        made += 0 if parameter is None else parameter.numel()
        if made > count:
            raise ValueError(f"a model of more than {count:g} weights")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


# ---- which config ----------------------------------------------------------------------------------
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
