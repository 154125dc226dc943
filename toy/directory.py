"""The directory of the toy's policy but for its weights: tokenizer, preprocessing values, config."""
import json
import os
import string

from benchmarks.toy import CANVAS
from data import FPS, GROUNDING_TASK, KEYFRAME_TASK, SYSTEM, format_time
from toy.lessons import ANSWER_PIECES, WORDS

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>",
    "<|audio_bos|>", "<|audio_eos|>",
    "<|vision_bos|>", "<|vision_eos|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}<|vision_bos|><|{{ c.type | upper }}|><|vision_eos|>{% endif %}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)
PREPROCESSING = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    feature_size=32,
    hop_length=2000,
    n_fft=4000,
    chunk_length=30,
    sampling_rate=16000,
    padding_value=0.0,
    padding_side="left",
    return_attention_mask=True,
    dither=0.0,
    image_processor_type="Qwen2VLImageProcessor",
    patch_size=8,
    merge_size=2,
    temporal_patch_size=2,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
    video_tokens=9,
    image_tokens=64,
)
# The times of the first 49 frames.
TIMES = [format_time(n / FPS) for n in range(49)]


def write_directory(path) -> None:
    """Makes the directory and writes all of it but for the weights."""
    os.makedirs(path, exist_ok=True)
    ids, vocabulary = make_tokenizer(path)
    write(path, "preprocessor_config.json", PREPROCESSING)
    write(path, "config.json", make_config(ids, vocabulary))


def fixed_text() -> list[str]:
    """The pieces of prompts and answers that never change. Each becomes one token: toy prompts are short."""
    pieces = ["system\n" + SYSTEM, "assistant\n"]
    for task in (KEYFRAME_TASK, GROUNDING_TASK):
        template = "user\n" + "".join(task)
        for literal, *_ in string.Formatter().parse(template):
            if literal:
                pieces.append(literal)
    return pieces + ANSWER_PIECES


def make_tokenizer(path) -> tuple[dict[str, int], int]:
    """Writes a unigram tokenizer. Returns the ids of SPECIAL and the size of the vocabulary.

    Every piece costs the same, so that text is cut into as few of them as possible.
    """
    from tokenizers import Tokenizer, decoders, models
    pieces = ["<unk>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(32, 127)]
    pieces += fixed_text()
    pieces += WORDS
    pieces += [" " + word for word in WORDS]
    pieces += [str(n) for n in range(10, CANVAS)]
    pieces += TIMES
    # Without repetitions.
    scored = [(piece, -1.0) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(os.path.join(path, "tokenizer.json"))
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        chat_template=CHAT,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    write(path, "tokenizer_config.json", config)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    return ids, tokenizer.get_vocab_size()


def write(path, name, value):
    with open(os.path.join(path, name), "w") as file:
        json.dump(value, file, indent=1)


def make_config(ids, vocabulary, width=128) -> dict:
    """Thinker configuration of about 1.5M parameters, every part of the 7B's in small."""
    return dict(
        model_type="qwen2_5_omni_thinker",
        architectures=["Qwen2_5OmniThinkerForConditionalGeneration"],
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        pad_token_id=ids["<|endoftext|>"],
        position_id_per_seconds=2,
        # 8 mel frames a second make 2 audio tokens.
        seconds_per_chunk=2,
        vision_config=vision_config(width),
        audio_config=audio_config(width),
        text_config=text_config(width, vocabulary),
    )


def vision_config(width):
    return dict(
        depth=2,
        hidden_size=96,
        embed_dim=96,
        intermediate_size=192,
        num_heads=4,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=64,
        out_hidden_size=width,
        fullatt_block_indexes=[0, 1],
    )


def audio_config(width):
    return dict(
        num_mel_bins=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=96,
        d_model=48,
        output_dim=width,
        max_source_positions=64,
        n_window=10,
    )


def text_config(width, vocabulary):
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_theta=10000.0, rope_type="default", mrope_section=[4, 6, 6]),
    )
