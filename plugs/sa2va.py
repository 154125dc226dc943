"""Sa2VA as System 2: it draws masks on keyframes, and our SAM2 tracks them.

    SA2VA=ByteDance/Sa2VA-4B SA2VA_REVISION=COMMIT python eval.py --system2 plugs/sa2va.py ...

SA2VA is a name on Hugging Face or a folder. THE CODE BESIDE ITS WEIGHTS RUNS HERE, WITH YOUR RIGHTS, which
transformers calls trust_remote_code. So a name needs SA2VA_REVISION, the 40 digits of a commit that you have
read. A branch could bring other code tomorrow.
"""
import os
import re
import sys

import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from trust.errors import BadInput

NAME = os.environ.get("SA2VA", "ByteDance/Sa2VA-4B")
REVISION = os.environ.get("SA2VA_REVISION", "")


def load():
    """(the model, what it reads text by). Raises BadInput where the revision is no commit."""
    if not os.path.isdir(NAME) and not re.fullmatch("[0-9a-f]{40}", REVISION):
        raise BadInput(f"SA2VA_REVISION={REVISION}: {NAME} needs the 40 digits of a commit, whose code runs")
    print(f"plugs/sa2va.py runs the code of {NAME} {REVISION}", file=sys.stderr)
    commit = REVISION or None
    place = dict(revision=commit, code_revision=commit, trust_remote_code=True)
    model = AutoModel.from_pretrained(NAME, dtype=torch.bfloat16, use_flash_attn=False, **place)
    # A Sa2VA made of Qwen asks for a processor, one made of InternVL for a tokenizer.
    if type(model).__name__.endswith("Qwen"):
        reader = dict(processor=AutoProcessor.from_pretrained(NAME, **place))
    else:
        reader = dict(tokenizer=AutoTokenizer.from_pretrained(NAME, **place))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), reader


MODEL, READER = load()


@torch.no_grad()
def masks(image, description):
    """A mask for each [SEG] that Sa2VA writes. Each entry has one mask for each frame; a picture is one."""
    answer = MODEL.predict_forward(image=image, text=f"<image>Please segment {description}.", **READER)
    return [frames[0] for frames in answer["prediction_masks"]]
