"""Files of models that somebody else made, badly or for harm: policies, SAM2, System 2 as a file.

Each is refused by one line that names the file, before anything is run, read without end, or computed with.
"""
import json
import os
import shutil
import zipfile

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from data import Processor
from model import Thinker, read_config
from segment import Tracker
from tests.world import ROOT, SMALL_FILES, TOY
from trust import policy as policy_file
from trust.errors import BadInput
from trust.plugged import NoBoxes, plugged
from trust.policy import tried
from trust.sam2_config import TARGETS, build_sam2

SAM2 = str(ROOT / "toy/sam2")
INDEX = "model.safetensors.index.json"


def refuses(path, function, *arguments):
    """Asserts that a function raises one line that names the path. Returns the line."""
    with pytest.raises((BadInput, FileNotFoundError)) as caught:
        function(*arguments)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def change(file, **values):
    """Writes values into an object of JSON. Those of None are removed."""
    record = json.loads(file.read_text())
    record.update(values)
    for name in [name for name, value in values.items() if value is None]:
        del record[name]
    file.write_text(json.dumps(record))


def change_part(file, part, **values):
    record = json.loads(file.read_text())
    record[part].update(values)
    file.write_text(json.dumps(record))


@pytest.fixture
def small(tmp_path):
    """The toy's policy without weights."""
    path = tmp_path / "policy"
    shutil.copytree(TOY, path, ignore=SMALL_FILES)
    return path


@pytest.fixture
def whole(small):
    """The toy's policy."""
    shutil.copyfile(TOY / "model.safetensors", small / "model.safetensors")
    return small


# ---- code in a policy's folder ---------------------------------------------------------------------
def test_a_policys_code_is_neither_run_nor_asked_about(small, tmp_path, monkeypatch):
    """Its classes are named in every file in which transformers looks for them."""
    marker = tmp_path / "ran"
    lines = [f"open({str(marker)!r}, 'w')", "class Mine: pass"]
    (small / "mine.py").write_text("\n".join(lines))
    classes = ("AutoConfig", "AutoTokenizer", "AutoFeatureExtractor", "AutoProcessor", "AutoModel")
    auto_map = dict.fromkeys(classes, "mine.Mine")
    auto_map["AutoTokenizer"] = ["mine.Mine", "mine.Mine"]
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        change(small / name, auto_map=auto_map)
    (small / "processor_config.json").write_text(json.dumps(dict(auto_map=auto_map)))

    def ask(*_):
        pytest.fail("it asks")

    monkeypatch.setattr("builtins.input", ask)
    Processor(str(small))
    read_config(small)
    change(small / "config.json", model_type="mine")
    refuses(small / "config.json", Processor, str(small))
    assert not marker.exists()


def test_tokenizers_of_other_kinds_are_refused(small):
    change(small / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    assert "BertJapaneseTokenizer" in refuses(small / "tokenizer_config.json", Processor, str(small))


# ---- files that are none ---------------------------------------------------------------------------
SMALL_NAMES = [
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "merges.txt",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_small_files_are_ordinary_ones(small, name):
    path = small / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refuses(path, Processor, str(small))
    refuses(path, read_config, small)
    path.unlink()
    # As large as a disk allows, without its bytes.
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    refuses(path, Processor, str(small))
    refuses(path, read_config, small)


def test_a_policys_folder_may_hold_other_things(small):
    os.mkfifo(small / "socket")
    os.symlink("nowhere", small / "README.md")
    (small / "folder.json").mkdir()
    Processor(str(small)).save(str(small / "folder.json/copy"))


def test_linked_files_are_copied_and_another_runs_record_is_not(small, tmp_path):
    shutil.move(small / "tokenizer.json", tmp_path / "blob")
    os.symlink(tmp_path / "blob", small / "tokenizer.json")
    (small / "run.json").write_text("{}")
    Processor(str(small)).save(str(tmp_path / "copy"))
    assert not (tmp_path / "copy/tokenizer.json").is_symlink()
    assert not (tmp_path / "copy/run.json").exists()
    assert (tmp_path / "copy/training.json").exists()


# ---- numbers of config.json ------------------------------------------------------------------------
CONFIG_VALUES = {
    "text_config": [
        dict(hidden_act="gelu"),
        dict(rms_norm_eps=0),
        dict(rms_norm_eps=-1e-6),
        dict(rms_norm_eps="NaN"),
        dict(rms_norm_eps=1e-300),
        dict(num_hidden_layers=10 ** 9),
        dict(num_hidden_layers=0),
        dict(num_hidden_layers=4.0),
        dict(num_hidden_layers=True),
        dict(vocab_size=10 ** 12),
        dict(hidden_size=10 ** 9),
        dict(hidden_size=130),
        dict(num_attention_heads=3),
        dict(num_key_value_heads=3),
        dict(num_key_value_heads=0),
        dict(head_dim=16),
        dict(use_sliding_window=True, sliding_window=8),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 7])),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[16])),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[-4, 14, 6])),
        dict(rope_parameters=dict(rope_type="default", rope_theta=0, mrope_section=[4, 6, 6])),
        dict(rope_parameters=dict(rope_type="linear", factor=2, rope_theta=1e4, mrope_section=[4, 6, 6])),
        dict(rope_parameters=5),
    ],
    "vision_config": [
        dict(depth=10 ** 9),
        dict(num_heads=0),
        dict(num_heads=7),
        dict(out_hidden_size=64),
        dict(patch_size=-8),
        dict(hidden_act="nothing"),
    ],
    "audio_config": [
        dict(encoder_layers=10 ** 9),
        dict(max_source_positions=10 ** 12),
        dict(output_dim=64),
        dict(d_model=49),
    ],
}
CONFIG_CASES = []
for part_name, bad_values in CONFIG_VALUES.items():
    for bad_value in bad_values:
        CONFIG_CASES.append((part_name, bad_value))


@pytest.mark.parametrize("part, values", CONFIG_CASES)
def test_a_config_that_our_code_does_not_compute_is_refused(small, part, values):
    file = small / "config.json"
    change_part(file, part, **values)
    refuses(file, Thinker.from_pretrained, small)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_config_has_finite_numbers(small, number):
    file = small / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"rms_norm_eps": 1e-06', f'"rms_norm_eps": {number}'))
    assert file.read_text() != text
    refuses(file, Thinker.from_pretrained, small)


@pytest.mark.parametrize("values", [
    dict(image_token_index=-1),
    dict(vision_end_token_id="593"),
    dict(audio_end_token_id=1.5),
])
def test_tokens_of_a_config_are_numbers(small, values):
    change(small / "config.json", **values)
    refuses(small / "config.json", Thinker.from_pretrained, small)


@pytest.mark.parametrize("part, values", [
    ("vision_config", dict(patch_size=16)),
    ("vision_config", dict(spatial_merge_size=4)),
    ("audio_config", dict(num_mel_bins=64)),
    ("text_config", dict(vocab_size=593)),
])
def test_the_parts_of_a_policy_fit_together(small, part, values):
    change_part(small / "config.json", part, **values)
    assert next(iter(values)) in refuses(small / "config.json", Processor, str(small))


def test_the_tokenizers_placeholders_are_those_of_the_model(small):
    change(small / "config.json", video_token_index=5)
    assert "video_token_index" in refuses(small / "config.json", Processor, str(small))


# ---- preprocessing ---------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [
    dict(patch_size=0),
    dict(patch_size=-8),
    dict(patch_size=8.5),
    dict(patch_size="8"),
    dict(patch_size=None),
    dict(patch_size=10 ** 9),
    dict(merge_size=0),
    dict(merge_size=[2]),
    dict(temporal_patch_size=0),
    dict(video_tokens=-1),
    dict(video_tokens=0),
    dict(video_tokens=10 ** 9),
    dict(image_tokens=1.5),
    dict(image_mean=0.5),
    dict(image_mean=[0.5, 0.5]),
    dict(image_mean=[0.5, 0.5, "0.5"]),
    dict(image_mean=[1e999] * 3),
    dict(image_std=[0.5, 0.5, 0]),
    dict(image_std=[0.5, 0.5, -0.5]),
    dict(image_std=[0.5, 0.5, 1e-300]),
    dict(sampling_rate=44100),
    dict(sampling_rate="16000"),
    dict(hop_length=0),
    dict(n_fft=0),
    dict(n_fft=10 ** 12),
    dict(n_fft="400"),
    dict(feature_size=10 ** 9),
    dict(chunk_length=0),
    dict(dither="much"),
    dict(padding_value="x"),
    dict(padding_side="below"),
])
def test_preprocessing_that_cannot_be_done_is_refused(small, values):
    file = small / "preprocessor_config.json"
    change(file, **values)
    refuses(file, Processor, str(small))


@pytest.mark.parametrize("name", ["position_id_per_seconds", "seconds_per_chunk"])
@pytest.mark.parametrize("value", [0, -1, "2", 1e999, 1e9, None, [2], 1e-4])
def test_positions_of_a_second_are_sensible(small, name, value):
    file = small / "config.json"
    record = json.loads(file.read_text())
    record[name] = value
    file.write_text(json.dumps(record))
    refuses(file, Processor, str(small))


# ---- chat templates --------------------------------------------------------------------------------
GOOD = json.loads((TOY / "tokenizer_config.json").read_text())["chat_template"]
TEMPLATES = {
    "not closed": GOOD.replace("{% endif %}", "", 1),
    "an error": GOOD + "{{ 1 / 0 }}",
    "refuses": GOOD + "{{ raise_exception('two\nlines') }}",
    "unknown": GOOD + "{{ nobody.nothing }}",
    "private": GOOD + "{{ messages.__class__.__mro__ }}",
    "empty": "",
    "no query": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "no media": GOOD.replace("<|vision_bos|>", ""),
    "media twice": GOOD + "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "large": GOOD + "{{ 'a' * 10 ** 10 }}",
    "long": GOOD + " " * policy_file.LONGEST_TEMPLATE,
    "no text": 5,
    "several": [dict(name="default", template=GOOD), dict(name="other", template=GOOD)],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_bad_chat_templates_are_named(small, name):
    file = small / "tokenizer_config.json"
    change(file, chat_template=TEMPLATES[name])
    refuses(small, Processor, str(small))
    # Newer checkpoints have a file for it, older ones another.
    if isinstance(TEMPLATES[name], str):
        change(file, chat_template=GOOD)
        (small / "chat_template.jinja").write_text(TEMPLATES[name])
        refuses(small / "chat_template.jinja", Processor, str(small))


def test_a_template_in_its_own_json_is_looked_at_too(small):
    change(small / "tokenizer_config.json", chat_template=None)
    file = small / "chat_template.json"
    file.write_text(json.dumps(dict(chat_template=GOOD)))
    Processor(str(small))
    for bad in (dict(chat_template="{{"), dict(chat_template=None), {}):
        file.write_text(json.dumps(bad))
        refuses(file, Processor, str(small))


def forever():
    while True:
        pass


def test_what_never_ends_is_ended():
    line = refuses("file", lambda: tried(forever, "file", seconds=0.2))
    assert "longer than 0.2 s" in line
    assert "ends the process" in refuses("file", lambda: tried(lambda: os._exit(3), "file"))
    assert "MemoryError" in refuses("file", lambda: tried(lambda: bytes(1 << 34), "file"))
    assert tried(lambda: ["a"], "file") == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("loop", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** 10 ** 10 }}",
])
def test_a_template_that_loops_for_ever_is_named(small, loop):
    change(small / "tokenizer_config.json", chat_template=GOOD + loop)
    assert "longer than" in refuses(small / "tokenizer_config.json", Processor, str(small))


# ---- weights of a policy ---------------------------------------------------------------------------
def rewrite(path, change_weight):
    """Writes the toy's weights with its output head changed."""
    weights = load_file(TOY / "model.safetensors")
    weights["lm_head.weight"] = change_weight(weights["lm_head.weight"].clone())
    save_file(weights, path / "model.safetensors")


def put(number):
    def change_weight(weight):
        weight[3, 5] = number
        return weight
    return change_weight


@pytest.mark.parametrize("change_weight, message", [
    (put(float("nan")), "NaN"),
    (put(float("inf")), "NaN or infinity"),
    (put(-float("inf")), "NaN or infinity"),
    (lambda weight: weight.to(torch.int8), "quantized"),
    (lambda weight: weight.bool(), "quantized"),
    (lambda weight: weight.to(torch.float8_e4m3fn), "quantized"),
    (lambda weight: weight[1:], "size mismatch"),
])
def test_weights_that_cannot_be_computed_with_are_refused(whole, change_weight, message):
    rewrite(whole, change_weight)
    line = refuses(whole / "model.safetensors", Thinker.from_pretrained, whole)
    assert "lm_head.weight" in line
    assert message in line


def test_a_huge_weight_is_refused_before_it_is_read(whole):
    """A file with holes may claim more than the memory holds."""
    header = {"lm_head.weight": dict(dtype="F32", shape=[1 << 18, 1 << 18], data_offsets=[0, 1 << 38])}
    text = json.dumps(header).encode()
    with open(whole / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 38))
    # Where the file cannot even be mapped, the message is another.
    refuses(whole / "model.safetensors", Thinker.from_pretrained, whole)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", "", "..", "a\nb", 5])
def test_shards_lie_in_the_policys_folder(whole, name):
    shutil.move(whole / "model.safetensors", whole.parent / "model.safetensors")
    (whole / INDEX).write_text(json.dumps(dict(weight_map={"lm_head.weight": name})))
    refuses(whole / INDEX, Thinker.from_pretrained, whole)


def test_a_shard_is_an_ordinary_file(small):
    (small / INDEX).write_text(json.dumps(dict(weight_map={"lm_head.weight": "shard.safetensors"})))
    os.mkfifo(small / "shard.safetensors")
    assert "no ordinary file" in refuses(small / "shard.safetensors", Thinker.from_pretrained, small)


# ---- SAM2: the config ------------------------------------------------------------------------------
def sam2_config():
    with open(f"{SAM2}/config.yaml") as file:
        return yaml.safe_load(file)


def written(path, config):
    path.write_text(yaml.safe_dump(config))
    return path


HARM = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "numpy.load",
    "urllib.request.urlretrieve",
    "trust.plugged.plugged",
    "sam2.build_sam.build_sam2_hf",
    "sam2.build_sam._load_checkpoint",
    # Names that modules of SAM2 have only imported.
    "sam2.modeling.sam2_base.torch.load",
    "sam2.modeling.backbones.hieradet.g_pathmgr.open",
    "sam2.modeling.backbones.hieradet.Hiera.load_state_dict",
    "torch.nn.Module.__init__.__globals__.get",
    "torch.nn.modules.module.torch.load",
    "",
    None,
    ["os.system"],
    dict(a="os.system"),
]


@pytest.mark.parametrize("target", HARM)
def test_a_sam2_config_calls_nothing_but_parts_of_sam2(tmp_path, monkeypatch, target):
    def call(*_, **__):
        pytest.fail("something is called")

    monkeypatch.setattr("hydra.utils.instantiate", call)
    places = [
        lambda model: model,
        lambda model: model["image_encoder"]["trunk"],
        lambda model: model["sam_mask_decoder_extra_args"],
    ]
    for place in places:
        config = sam2_config()
        place(config["model"])["_target_"] = target
        path = written(tmp_path / "bad.yaml", config)
        assert "_target_" in refuses(path, build_sam2, path)
    config = sam2_config()
    config["model"]["image_encoder"]["trunk"]["stages"] = [[dict(_target_=target)]]
    path = written(tmp_path / "bad.yaml", config)
    refuses(path, build_sam2, path)


@pytest.mark.parametrize("key, value", [
    ("weights_path", "/etc/passwd"),
    ("_args_", ["/etc/passwd"]),
    ("_partial_", True),
    ("_recursive_", False),
    ("_convert_", "all"),
    ("embed_dim", "${oc.env:HOME}"),
    ("embed_dim", "${model.image_size}"),
    ("embed_dim", 10 ** 9),
    ("embed_dim", -10 ** 9),
    ("embed_dim", float("nan")),
    ("embed_dim", 4096),
    ("stages", [1, 1, 10 ** 9, 1]),
    ("stages", [1, 1, 4000, 1]),
    ("window_spec", [5, 4, 8, 4]),
    ("window_spec", [0, 4, 8, 4]),
    ("window_spec", 8),
    ("drop_path_rate", "much"),
])
def test_a_sam2_trunk_is_described_by_plain_numbers(tmp_path, key, value):
    config = sam2_config()
    config["model"]["image_encoder"]["trunk"][key] = value
    path = written(tmp_path / "bad.yaml", config)
    refuses(path, build_sam2, path)


@pytest.mark.parametrize("key, value", [
    ("image_size", 10 ** 6),
    ("image_size", 1e6),
    ("image_size", 100),
    ("image_size", 0),
    ("image_size", -128),
    ("image_size", "128"),
    ("image_size", [128, 128]),
    ("backbone_stride", 8),
    ("num_maskmem", 10 ** 9),
    ("nobody", 1),
])
def test_a_sam2_model_is_described_by_plain_numbers(tmp_path, key, value):
    config = sam2_config()
    config["model"][key] = value
    path = written(tmp_path / "bad.yaml", config)
    refuses(path, build_sam2, path)


ALIASES = "a: &a [1, 1]\nb: &b [*a, *a]\nmodel: {c: [*b, *b]}\n"


@pytest.mark.parametrize("text", [
    "", "[1]", "model: 5", "model: [1]", "model: {", "x: 1", ALIASES,
    "model: " + "[" * 9_000, "model: " + "- " * 9_000, "#" * 200_000,
    "\0", "model: !!python/object/apply:os.system [true]",
    "model: ${oc.env:HOME}", "model: {1: {2: {_target_: x}}}",
])
def test_what_is_no_sam2_config_is_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refuses(path, build_sam2, path)


def test_a_sam2_config_is_an_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    refuses(tmp_path / "config.yaml", build_sam2, tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["sam2.1_hiera_t", "configs/sam2/sam2_hiera_s.yaml"])
def test_published_sam2_configs_are_read(name):
    assert build_sam2(name).image_size == 1024


def test_every_target_is_one_of_the_published_configs(tmp_path):
    import sam2
    found = set()
    for path in (ROOT / os.path.dirname(sam2.__file__) / "configs/sam2.1").glob("*.yaml"):
        for line in path.read_text().splitlines():
            if "_target_:" in line:
                found.add(line.split(":")[1].strip())
    assert found == set(TARGETS)


# ---- SAM2: the weights -----------------------------------------------------------------------------
def sam2_refuses(path):
    return refuses(path, Tracker.from_pretrained, f"{SAM2}/config.yaml", path)


@pytest.mark.parametrize("change_weight, message", [
    (lambda weight: weight.fill_(float("nan")), "NaN"),
    (lambda weight: weight.fill_(float("inf")), "infinity"),
    (lambda weight: weight.to(torch.int8), "int8"),
    (lambda weight: weight.bool(), "bool"),
])
def test_sam2_weights_are_finite_numbers(tmp_path, change_weight, message):
    state = torch.load(f"{SAM2}/model.pt", weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name] = change_weight(state["model"][name])
    torch.save(state, tmp_path / "bad.pt")
    line = sam2_refuses(tmp_path / "bad.pt")
    assert name in line
    assert message in line


def test_a_compressed_pt_is_refused(tmp_path):
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(f"{SAM2}/model.pt") as source:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    assert "compressed" in sam2_refuses(path)


def test_sam2_weights_are_an_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "bad.pt")
    assert "no ordinary file" in sam2_refuses(tmp_path / "bad.pt")


# ---- System 2 as a file ----------------------------------------------------------------------------
@pytest.mark.parametrize("result", [
    "None", "3", "'a'", "'1234'", "['1234']", "[b'1234']", "[None]", "[(1, 2, 3)]", "[(1, 2, 3, 4, 5)]",
    "[(5, 2, 1, 4)]", "[1, 2, 3, 4]", "[(0, 0, 1, float('nan'))]", "[(0, 0, 1, float('inf'))]",
    "[(0, 0, 1, 10 ** 400)]", "[(0, 0, 1, 1j)]", "numpy.zeros(4)", "numpy.zeros((2, 3))",
    "numpy.zeros((2, 4, 2))", "torch.zeros(2, 4, 2)", "[['a\\nb'] * 4]", "object()",
])
def test_junk_of_a_plugged_file_is_one_line(tmp_path, result):
    path = tmp_path / "mine.py"
    path.write_text(f"import numpy, torch\n\ndef boxes(image, description):\n    return {result}\n")
    system2 = plugged(str(path))
    with pytest.raises(NoBoxes) as caught:
        system2([Image.new("RGB", (9, 9))], ["dog"])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "returned" in str(caught.value)


def test_a_plugged_files_own_error_is_not_touched(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def boxes(image, description):\n    return [1][5]\n")
    with pytest.raises(IndexError):
        plugged(str(path))([Image.new("RGB", (9, 9))], ["dog"])


def test_a_plugged_file_is_an_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "mine.py")
    refuses(tmp_path / "mine.py", plugged, str(tmp_path / "mine.py"))
