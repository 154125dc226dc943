"""The folder of a policy: what its small files may say.

Whoever made a policy may have made it badly, or for harm. SECURITY.md says what is left.
"""
import multiprocessing
import os
import resource

from trust.errors import BadInput, one_line
from trust.files import check_file, check_policy_folder, read_json

# Bytes of a small file. The largest of Qwen2.5-Omni is tokenizer.json, 11 MB.
LARGEST_FILE = 1 << 26
ENDINGS = (".json", ".jinja", ".model", ".txt")
# Tokenizers without code of their own. Qwen2.5-Omni has the first.
TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
LONGEST_TEMPLATE = 100_000    # letters
# Of what is divided by. Smaller numbers are 0 in float32, or nearly.
LEAST = 1e-12

# Largest whole numbers of config.json. Those of the 7B are ten or more times smaller.
CONFIG = dict(
    num_hidden_layers=1000,
    encoder_layers=1000,
    depth=1000,
    num_attention_heads=1024,
    num_key_value_heads=1024,
    encoder_attention_heads=1024,
    num_heads=1024,
    hidden_size=1 << 16,
    intermediate_size=1 << 20,
    out_hidden_size=1 << 16,
    output_dim=1 << 16,
    d_model=1 << 14,
    encoder_ffn_dim=1 << 20,
    vocab_size=1 << 21,
    max_position_embeddings=1 << 30,
    max_source_positions=20_000,
    num_mel_bins=1024,
    n_window=10_000,
    in_channels=16,
    patch_size=256,
    spatial_merge_size=16,
    temporal_patch_size=16,
    window_size=1 << 14,
)
# The same of preprocessor_config.json.
PREPROCESSING = dict(
    patch_size=256,
    merge_size=16,
    temporal_patch_size=16,
    video_tokens=16_384,
    image_tokens=16_384,
    feature_size=1024,
    n_fft=1 << 16,
    hop_length=1 << 14,
    chunk_length=3600,
)


# ---- files -----------------------------------------------------------------------------------------
def small_files(folder) -> list[str]:
    """Names of a policy's small files. Raises BadInput where one is no ordinary file, or is large.

    transformers opens some of them by itself.
    """
    names = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name == "additional_chat_templates":
            raise BadInput(f"{path}: a policy has one chat template")
        if name.endswith(ENDINGS) and not os.path.isdir(path):
            check_small(path)
            names.append(name)
    return names


def check_small(path) -> None:
    """Raises FileNotFoundError or BadInput unless there is an ordinary file that is not large."""
    check_file(path)
    size = os.path.getsize(path)
    if size > LARGEST_FILE:
        raise BadInput(f"{path} is too large for a small file: {size} bytes, at most {LARGEST_FILE}")


def kept_files(folder) -> list[str]:
    """Names of the small files that go on into a policy that is trained from this one.

    The Thinker writes its own config.json and index of weights, and run.json is of another run.
    """
    left = ("config.json", "run.json")
    return [name for name in small_files(folder) if name not in left and "safetensors" not in name]


def read_policy_config(folder) -> tuple[dict, dict]:
    """config.json of a policy and, of it, the Thinker's part. All small files are looked at before.

    Raises FileNotFoundError or BadInput, naming the path and what was expected there.
    """
    check_policy_folder(folder)
    small_files(folder)
    file = os.path.join(folder, "config.json")
    whole = read_json(file)
    config = whole.get("thinker_config", whole)
    if not isinstance(config, dict) or config.get("model_type") != "qwen2_5_omni_thinker":
        raise BadInput(f"{file} describes a {whole.get('model_type')} model; "
                       f"expected qwen2_5_omni with a thinker_config, or qwen2_5_omni_thinker")
    # transformers makes a list as long as a model has layers, so this comes before.
    check_sizes(whole, file)
    return whole, config


def check_sizes(config, file) -> None:
    """Raises BadInput where a number of config.json, however deep inside, is out of bounds."""
    inside = config.values() if isinstance(config, dict) else config
    for value in inside:
        if isinstance(value, (dict, list)):
            check_sizes(value, file)
    if isinstance(config, dict):
        for name in CONFIG.keys() & config.keys():
            # Some may be left open.
            if config[name] is not None:
                check_whole(name, config[name], CONFIG[name], file)


# ---- numbers ---------------------------------------------------------------------------------------
def check_whole(name: str, value, most: int, file) -> None:
    """Raises BadInput unless a value is a whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise BadInput(f"cannot use {file} ({name} must be a whole number from 1 to {most}, "
                       f"not {shown(value)})")


def check_number(name: str, value, most: float, file) -> None:
    """Raises BadInput unless a value is a number from LEAST to `most`."""
    if type(value) not in (int, float) or not LEAST <= value <= most:
        raise BadInput(f"cannot use {file} ({name} must be a number above 0, at most {most:g}, "
                       f"not {shown(value)})")


def shown(value) -> str:
    return " ".join(repr(value)[:80].split())


def check_equal(name: str, value, expected, file) -> None:
    if value != expected:
        raise BadInput(f"cannot use {file} ({name} must be {expected}, not {shown(value)})")


def check_language_model(text, file) -> None:
    """What model.py assumes of a text_config. Raises BadInput where it is otherwise."""
    D = text.hidden_size
    H = text.num_attention_heads
    for name, width, heads in (("hidden_size", D, H), ("num_attention_heads", H, text.num_key_value_heads)):
        if width % heads:
            raise BadInput(f"cannot use {file} ({name} {width} is not divisible by {heads} heads)")
    d = D // H
    check_equal("head_dim", getattr(text, "head_dim", None) or d, d, file)
    check_equal("hidden_act", text.hidden_act, "silu", file)
    check_equal("use_sliding_window", bool(text.use_sliding_window), False, file)
    check_number("rms_norm_eps", text.rms_norm_eps, 0.1, file)
    rope = text.rope_parameters
    check_number("rope_theta", rope.get("rope_theta"), 1e12, file)
    check_equal("rope_type", rope.get("rope_type", "default"), "default", file)
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3:
        raise BadInput(f"cannot use {file} (mrope_section must be three numbers, not {shown(sections)})")
    for section in sections:
        check_whole("mrope_section", section, d, file)
    if d % 2 or 2 * sum(sections) != d:
        raise BadInput(f"cannot use {file} (mrope_section {sections} must add up to half of the {d} numbers "
                       f"of a head)")


def check_thinker(config, prompt_only, file) -> None:
    """What our code assumes of a Thinker's config. Raises BadInput where it is otherwise.

    prompt_only: names of ids of tokens.
    """
    text = config.text_config
    check_language_model(text, file)
    D = text.hidden_size
    check_equal("out_hidden_size of vision_config", config.vision_config.out_hidden_size, D, file)
    check_equal("output_dim of audio_config", config.audio_config.output_dim, D, file)
    for tower, heads in (("vision_config", "num_heads"), ("audio_config", "encoder_attention_heads")):
        part = getattr(config, tower)
        width = part.hidden_size if tower == "vision_config" else part.d_model
        if width % getattr(part, heads):
            raise BadInput(f"cannot use {file} ({heads} of {tower} does not divide its width {width})")
    for name in prompt_only:
        token = getattr(config, name, None)
        # An id past the vocabulary is that of a token that does not exist.
        if token is not None and (type(token) is not int or token < 0):
            raise BadInput(f"cannot use {file} ({name} must be the number of a token, not {shown(token)})")


def positions_of_time(thinker: dict, file) -> tuple[float, int]:
    """Position ids of a second, and of a turn of video or sound. Raises BadInput where they are odd."""
    per_second = thinker.get("position_id_per_seconds", 25)
    seconds = thinker.get("seconds_per_chunk", 2)
    check_number("position_id_per_seconds", per_second, 1000, file)
    check_number("seconds_per_chunk", seconds, 1000, file)
    chunk = int(per_second * seconds)
    check_number("the number of positions of a chunk", chunk, 1e6, file)
    return per_second, chunk


def check_fit(processor) -> None:
    """Raises BadInput where config.json does not fit preprocessing and tokenizer of a data.Processor.

    The towers would fail over such media, and the embeddings over such tokens.
    """
    file = os.path.join(processor.path, "config.json")
    config = processor.config
    vision = config.vision_config
    check_equal("patch_size", vision.patch_size, processor.patch, file)
    check_equal("spatial_merge_size", vision.spatial_merge_size, processor.merge, file)
    check_equal("temporal_patch_size", vision.temporal_patch_size, processor.pair, file)
    check_equal("num_mel_bins", config.audio_config.num_mel_bins, processor.features.feature_size, file)
    check_equal("image_token_index", config.image_token_index, processor.image, file)
    check_equal("video_token_index", config.video_token_index, processor.video, file)
    check_equal("audio_token_index", config.audio_token_index, processor.audio, file)
    most = config.text_config.vocab_size
    highest = max(processor.tokenizer.get_vocab().values())
    if highest >= most:
        raise BadInput(f"cannot use {file} (the tokenizer has a token {highest}, but vocab_size is {most})")


def read_preprocessing(file, rate: int) -> dict:
    """preprocessor_config.json. rate: as below. Raises FileNotFoundError or BadInput."""
    values = read_json(file)
    check_preprocessing(values, rate, file)
    return values


def check_preprocessing(values: dict, rate: int, file) -> None:
    """What data.py assumes of preprocessor_config.json. Raises BadInput where it is otherwise.

    rate: samples of a sound in a second.
    """
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        if name not in values:
            raise BadInput(f"cannot use {file} (it lacks {name})")
    for name in PREPROCESSING.keys() & values.keys():
        check_whole(name, values[name], PREPROCESSING[name], file)
    check_equal("sampling_rate", values.get("sampling_rate", rate), rate, file)
    for name in ("image_mean", "image_std"):
        colours = values[name]
        if not isinstance(colours, list) or len(colours) != 3:
            raise BadInput(f"cannot use {file} ({name} must be three numbers, not {shown(colours)})")
        for value in colours:
            if type(value) not in (int, float) or not abs(value) <= 1e6:
                raise BadInput(f"cannot use {file} ({name} must be three numbers, not {shown(colours)})")
    # We divide by it.
    for value in values["image_std"]:
        check_number("image_std", value, 1e6, file)


# ---- the chat template -----------------------------------------------------------------------------
def find_template(folder) -> str:
    """The file that holds a policy's chat template. Files of the tokenizer are looked at before.

    Raises FileNotFoundError or BadInput, naming a file.
    """
    file = os.path.join(folder, "tokenizer_config.json")
    values = read_json(file)
    read_json(os.path.join(folder, "tokenizer.json"))
    kind = values.get("tokenizer_class") or TOKENIZERS[0]
    if kind not in TOKENIZERS:
        raise BadInput(f"cannot use {file} (tokenizer_class {shown(kind)} is not that of Qwen2.5-Omni)")
    jinja = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(jinja):
        return jinja
    return os.path.join(folder, "chat_template.json") if values.get("chat_template") is None else file


def check_prompts(processor, chats, media, text: str) -> int:
    """Tries the chat template and the tokenizer of a data.Processor. Returns the number of tokens of a text.

    chats: messages of prompts. media: matches a place of a medium. Raises BadInput where a prompt does not
    hold its texts and exactly its media.
    """
    rendered = tried(lambda: [processor.render(chat) for chat in chats], processor.template)
    for chat, prompt in zip(chats, rendered):
        kinds = []
        for message in chat:
            for part in message["content"]:
                if part["type"] != "text":
                    kinds.append(part["type"].upper())
                elif part["text"] not in prompt:
                    raise BadInput(f"cannot use {processor.template} (its chat_template leaves out a text)")
        if media.findall(prompt) != kinds:
            raise BadInput(f"cannot use {processor.template} (its chat_template does not show {kinds} once)")
    tokenizer = os.path.join(processor.path, "tokenizer.json")
    return tried(lambda: len(processor.encode_text(text)), tokenizer)


def check_template(template, file) -> None:
    """Raises BadInput where a chat template is no text, or longer than one is."""
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise BadInput(f"cannot use {file} (its chat_template must be one text of at most {LONGEST_TEMPLATE} "
                       f"letters)")


def tried(function, file, seconds: float = 10.0, memory: int = 1 << 30):
    """What a function returns, tried in a child process: for the programs that stand inside data.

    A template or a regular expression may loop for ever, or fill the memory. Raises BadInput, naming the
    file, where it takes longer or `memory` more bytes, or raises anything.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(function, sender, memory), daemon=True)
    child.start()
    sender.close()
    problem = f"it takes longer than {seconds:g} s"
    try:
        if receiver.poll(seconds):
            problem, result = receiver.recv()
    except EOFError:
        problem = "it ends the process"
    finally:
        child.kill()
        child.join()
        receiver.close()
    if problem:
        raise BadInput(f"cannot use {file} ({problem})")
    return result


def answer(function, sender, memory: int) -> None:
    """In the child process: sends (problem, result)."""
    try:
        limit_memory(memory)
        result = function()
        problem = ""
    except Exception as error:
        result = None
        problem = one_line(error)
    sender.send((problem, result))


def limit_memory(more: int) -> None:
    """Lets this process take so many more bytes. Where the system does not say, there is no limit."""
    if not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
