"""System 2: boxes on keyframes (a frozen Thinker), masks on every frame (SAM2), and both as a program.

    python segment.py --video V --query Q --policy DIR --sam2_weights FILE --out DIR

    keyframes {t: description} -- ground --> {t: boxes} -- Tracker --> masks [T, H, W]

As a program it runs both systems on one video, a file or a folder of frames; without arguments it makes a toy clip and uses
the toy weights.
"""
import argparse
import importlib.util
import json
import os
import pickle
import sys
from dataclasses import dataclass, field
from inspect import isfunction
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import sam2
import torch
import torch.nn.functional as F
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw
from sam2.modeling.sam2_utils import get_1d_sine_pe

from data import BadInput, Clip, Parser, Processor, answer_text, at_least, fail, grounding_prompt, is_null, keyframes, one_line, \
    open_video, parse_boxes, parse_moments, plain, prompt_inputs, read_sound, toy_clip
from model import Thinker

HERE = Path(__file__).parent
TOY_POLICY, TOY_SAM2 = str(HERE / "toy/policy"), str(HERE / "toy/sam2/model.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Grounding: descriptions of keyframes -> boxes
# ---------------------------------------------------------------------------------------------------------------------
def ground(system2, processor, clips, chosen, max_new_tokens=128):
    """Boxes of what each completion described on its keyframes; all clips and completions in one ragged batch, and what is
    asked twice of the same frame is grounded once.

    system2  a Thinker, or any function from (image, description) to boxes in pixels of the image (plugged).
    chosen  for each of B clips a list over completions of {frame: description}.
    Returns the same with boxes in place of descriptions: {frame: [(x1, y1, x2, y2) in source pixels]}.
    """
    wanted = list(dict.fromkeys((i, t, what) for i, group in enumerate(chosen)
                                for frames in group for t, what in frames.items()))
    if not wanted:
        return [[{} for _ in group] for group in chosen]
    if isfunction(system2):
        answers = [(system2(clips[i].frames[t], what), (1.0, 1.0)) for i, t, what in wanted]
    else:
        inputs, first = [], {}                                   # what is described several ways is still seen once
        for i, t, what in wanted:
            inputs.append(processor.image_inputs(grounding_prompt(what), clips[i].frames[t], like=first.get((i, t))))
            first.setdefault((i, t), inputs[-1])
        rows = system2.generate(system2.embed(inputs), 1, max_new_tokens, eos_ids=processor.eos_ids, temperature=0.0)
        answers = [(parse_boxes(processor.decode(ids)), x.scale) for x, (ids,) in zip(inputs, rows)]
    found = {key: [to_source(box, scale, clips[key[0]].size) for box in boxes] for key, (boxes, scale) in zip(wanted, answers)}
    return [[{t: found[i, t, what] for t, what in frames.items()} for frames in group] for i, group in enumerate(chosen)]


def plugged(path):
    """The function `boxes` of a Python file, for `--system2 FILE.py`, with what it returns checked:

        def boxes(image: PIL.Image, description: str) -> list of (x1, y1, x2, y2) in pixels of the image, corners inside

    Raises FileNotFoundError without the file, BadInput without the function; the call, TypeError for any other value."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file of a grounder: {path}")
    spec = importlib.util.spec_from_file_location("grounder", path)
    if spec is None:
        raise BadInput(f"not a Python file: {path}")
    module = sys.modules["grounder"] = importlib.util.module_from_spec(spec)     # dataclasses look there
    spec.loader.exec_module(module)                              # what goes wrong in there is its author's to see
    function = getattr(module, "boxes", None)
    if not callable(function):
        raise BadInput(f"no function boxes(image, description) in: {path}")

    def boxes(image, description):
        found = function(image, description)
        try:
            rows = [tuple(float(value) for value in box) for box in found]
        except (TypeError, ValueError):
            rows = None
        if rows is None or not all(len(b) == 4 and np.isfinite(b).all() and b[0] <= b[2] and b[1] <= b[3] for b in rows):
            raise TypeError(f"boxes() of {path} returned {str(found)[:80]}, not a list of (x1, y1, x2, y2)")
        return rows
    return boxes


def to_source(box, scale, size):
    """A box in pixels of the resized picture -> source pixels, inside the (H, W) picture."""
    limits = (size[1] - 1, size[0] - 1) * 2
    return tuple(min(max(value * s, 0.0), limit) for value, s, limit in zip(box, scale * 2, limits))


# ---------------------------------------------------------------------------------------------------------------------
# SAM2: boxes on keyframes -> masks on every frame
# ---------------------------------------------------------------------------------------------------------------------
# Letters: N objects of a call, n of a batch, T frames, H W pixels of the source, S side of the square picture SAM2 sees,
# h w = S / 4, L = (S / 16)^2 places, D width of the features, M width of the memory, k = D / M tokens of a pointer.

BATCH = 32     # objects of one step; at S = 1024 each attends from 4096 places to some 29 thousand memory tokens
AHEAD = 8      # frames encoded at once
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What SAM2's own video predictor adds to its configs; a config that says otherwise is taken at its word. Its hole filler
# is left out: it needs a compiled extension.
PREDICTOR = {"binarize_mask_from_pts_for_mem_enc": True,
             "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": True,
                                             "dynamic_multimask_stability_delta": 0.05,
                                             "dynamic_multimask_stability_thresh": 0.98}}
# The options of every SAM 2.1 model that decide what a frame attends to. `Memory` and `_attend` know no others.
SAM21 = {"directly_add_no_mem_embed": True, "use_high_res_features_in_sam": True, "use_obj_ptrs_in_encoder": True,
         "add_tpos_enc_to_obj_ptrs": True, "proj_tpos_enc_in_obj_ptrs": True, "use_signed_tpos_enc_to_obj_ptrs": True,
         "only_obj_ptrs_in_the_past_for_eval": True, "max_cond_frames_in_attn": -1,
         "memory_temporal_stride_for_eval": 1, "non_overlap_masks_for_mem_enc": False}


class Seen(NamedTuple):
    """What SAM2 makes of n objects, each on one frame."""
    logits: torch.Tensor     # [n, h, w] of the mask; -1024 everywhere if the object is not seen
    score: torch.Tensor      # [n] positive if the object is seen
    map: torch.Tensor        # [n, L, M] memory of the frame and the mask on it
    pointer: torch.Tensor    # [n, k, M] memory of what the object is


@dataclass
class Memory:
    """What is kept of one object, by frame."""
    prompted: dict = field(default_factory=dict)     # t: (map, pointer), kept for good, also while t is still to come
    maps: dict = field(default_factory=dict)         # t: map of a tracked frame, the last few
    pointers: dict = field(default_factory=dict)     # t: pointer of a tracked frame, the last few more

    def recall(self, t, maps, pointers):
        """What frame t attends to: [(frames ago, map)], [(frames ago, pointer)]. Forgets frames not less than `maps`
        and `pointers` ago. The maps of prompted frames carry no time, 0; their pointers count once t is past them."""
        self.maps = {s: m for s, m in self.maps.items() if t - s < maps}
        self.pointers = {s: p for s, p in self.pointers.items() if t - s < pointers}
        return ([(0, m) for m, _ in self.prompted.values()] + [(t - s, m) for s, m in self.maps.items()],
                [(t - s, p) for s, (_, p) in self.prompted.items() if s <= t] + [(t - s, p) for s, p in self.pointers.items()])


class Tracker:
    """SAM2, frozen: boxes on keyframes -> masks on every frame (method.md 1).

    Its own video predictor tracks one object after the other; here all of them share one batch and every frame is
    encoded once, with the same result. All methods but `track` let gradients through.
    """

    def __init__(self, model):
        """model  a SAM2Base in evaluation mode. Raises BadInput if it is not of the SAM 2.1 kind."""
        other = [name for name, value in SAM21.items() if getattr(model, name) != value]
        if other:
            raise BadInput(f"not a SAM 2.1 model, it differs in: {', '.join(other)}")
        self.model, self.side = model, model.image_size
        places = torch.empty(1, 1, *model.sam_prompt_encoder.image_embedding_size, device=model.device)
        self.top_place = model.image_encoder.neck.position_encoding(places).flatten(2).permute(2, 0, 1)     # [L, 1, D]
        self.map_place = model.memory_encoder.position_encoding(places).flatten(2).mT                       # [1, L, M]

    @classmethod
    def from_pretrained(cls, config, weights, device="cpu"):
        """config  a yaml file, or the name of one inside the package sam2, such as sam2.1_hiera_l.
        weights  file {"model": state_dict} as published. Raises FileNotFoundError or BadInput naming the file."""
        model = build_sam2(config)
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no such file of SAM2 weights: {weights}")
        try:
            model.load_state_dict(dict(torch.load(weights, map_location="cpu", weights_only=True))["model"])
        except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
                pickle.UnpicklingError) as error:
            raise BadInput(f"not the SAM2 weights of config {config}: {weights} ({one_line(error)})") from None
        return cls(model.to(device))

    # -- one call, start to end ---------------------------------------------------------------------------------------
    def track(self, frames, objects, unions=None):
        """Masks of N objects on all T frames, bool array [N, T, H, W] at source size; objects may overlap.

        frames  T pictures of one size, read as they are needed.
        objects  N dicts {frame index: (x1, y1, x2, y2) in source pixels}, at least one box each. ValueError if not.
        unions  G lists of objects (by place in `objects`): then the masks are those of each list together, [G, T, H, W], and no
                more than one frame's are held of every object.
        """
        return self.track_clips([(frames, objects, unions)])[0]

    @torch.inference_mode()
    def track_clips(self, clips):
        """`track` for several clips (frames, objects, unions) at once: objects of all of them share the batches."""
        boxes, owner, masks = [], [], []                         # of all objects: boxes in the square picture, and whose they are
        for c, (frames, objects, unions) in enumerate(clips):
            T, (W, H) = len(frames), frames[0].size
            for n, found in enumerate(objects):
                if not found or not all(0 <= t < T for t in found):
                    raise ValueError(f"object {n} needs boxes on frames 0 to {T - 1}, not on {sorted(found)}")
            boxes += [{t: box * np.array([self.side / W, self.side / H] * 2) for t, box in found.items()} for found in objects]
            owner += [c] * len(objects)
            masks.append(np.zeros((len(objects if unions is None else unions), T, H, W), bool))
        lengths = [masks[c].shape[1] for c in owner]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.device.type == "cuda"):
            look = Lookout(self, [frames for frames, *_ in clips], owner, boxes)
            for t, (logits, _) in enumerate(self.run(look, boxes, lengths)):
                present = torch.tensor([c for c, T in zip(owner, lengths) if T > t])             # whose logits these are
                for c, (_, objects, unions) in enumerate(clips):
                    if not objects or t >= masks[c].shape[1]:
                        continue
                    full = torch.cat([F.interpolate(part[:, None], masks[c].shape[2:], mode="bilinear")[:, 0] > 0
                                      for part in logits[present == c].split(BATCH)]).cpu().numpy()     # [N, H, W]; waits
                    for mask, together in zip(masks[c], [[n] for n in range(len(objects))] if unions is None else unions):
                        mask[t] = full[together].any(0)
        return masks

    def run(self, look, objects, lengths):
        """Yields, for t = 0 ... max(lengths) - 1, logits [n, h, w] and scores [n] of those of N objects whose clip has a frame t.

        look(objects, frames)  features of n (object, frame) pairs: three levels [n, C, s, s], s = S / 4, S / 8, S / 16.
        objects  N dicts {frame index: box in pixels of the square picture}. lengths: N numbers of frames of their clips.
        """
        memories, answers = [Memory() for _ in objects], {}
        # 1. Prompted frames, each on its own, as if it were a still.
        for pairs in _parts([(n, t) for n, boxes in enumerate(objects) for t in boxes], BATCH):
            seen = self.prompt(look(*zip(*pairs)), torch.tensor(np.array([objects[n][t] for n, t in pairs])))
            for (n, t), logits, score, *memory in zip(pairs, *seen):
                answers[n, t] = logits, score
                memories[n].prompted[t] = memory
        # 2. Everything else in time's order, with the prompted frames as memory, those to come included.
        for t in range(max(lengths, default=0)):
            present = [n for n, T in enumerate(lengths) if T > t]
            for rows in _parts([n for n in present if t not in objects[n]], BATCH):
                seen = self.follow(look(rows, [t] * len(rows)), [memories[n] for n in rows], t, [lengths[n] for n in rows])
                for n, logits, score, *memory in zip(rows, *seen):
                    answers[n, t] = logits, score
                    memories[n].maps[t], memories[n].pointers[t] = memory
            logits, scores = zip(*(answers.pop((n, t)) for n in present))
            yield torch.stack(logits), torch.stack(scores)

    # -- parts --------------------------------------------------------------------------------------------------------
    def encode(self, pictures):
        """Features of B pictures [B, 3, S, S], normalised: three levels [B, C, s, s]."""
        return self.model.forward_image(pictures)["backbone_fpn"]

    def prompt(self, features, boxes):
        """Seen: n objects in n pictures, by their boxes [n, 4] alone."""
        points = {"point_coords": boxes.to(self.model.device, torch.float32).view(-1, 2, 2),
                  "point_labels": torch.tensor([[2, 3]], device=self.model.device).repeat(len(boxes), 1)}    # two corners
        return self._decode(features, features[-1] + self.model.no_mem_embed.view(1, -1, 1, 1), points)

    def follow(self, features, memories, t, lengths):
        """Seen: n objects on frame t of their clips, n lengths, by their n memories."""
        return self._decode(features, self._attend(features[-1], memories, t, lengths))

    def _attend(self, top, memories, t, lengths):
        """The top features [n, D, s, s] after they have attended to what each object's memory holds.

        SAM2's attention takes no mask, so objects that recall equally much form one batch: prompted once each, they
        differ in whether that frame is to come, recent or long past, which makes four batches at most."""
        span = self.model.num_maskmem, self.model.max_obj_ptrs_in_encoder
        recalled = [memory.recall(t, *span) for memory in memories]
        amounts = [(len(maps), len(pointers)) for maps, pointers in recalled]
        mixed = torch.empty_like(top, dtype=torch.float32)
        for amount in sorted(set(amounts)):
            rows = [i for i, a in enumerate(amounts) if a == amount]
            spans = [min(lengths[i], span[1]) for i in rows]
            tokens, places = self._tokens([recalled[i] for i in rows], spans)                  # [n, S L + R k, M] both
            attended = self.model.memory_attention(
                curr=top[rows].flatten(2).permute(2, 0, 1), curr_pos=self.top_place,           # [L, n, D] and [L, 1, D]
                memory=tokens.transpose(0, 1), memory_pos=places.transpose(0, 1),
                num_obj_ptr_tokens=tokens.shape[1] - amount[0] * self.map_place.shape[1])
            mixed[rows] = attended.permute(1, 2, 0).unflatten(2, top.shape[2:]).float()
        return mixed

    def _tokens(self, recalled, spans):
        """Memory tokens of n objects, S maps and then R pointers each, and their codes of place or time; spans: frames that the
        code of time of each is stretched over."""
        tokens = torch.stack([torch.cat([token for _, token in maps + pointers]) for maps, pointers in recalled])
        map_ago, ago = (torch.tensor([[ago for ago, _ in kind] for kind in kinds], device=tokens.device)
                        for kinds in zip(*recalled))                                           # [n, S], [n, R]
        map_code = self.map_place[:, None] + self.model.maskmem_tpos_enc[map_ago - 1].squeeze(2)    # 0 ago: the last code
        time = ago / (torch.tensor(spans, device=tokens.device)[:, None] - 1)                  # [n, R]
        code = self.model.obj_ptr_tpos_proj(get_1d_sine_pe(time, self.model.hidden_dim))       # [n, R, M]
        code = code.repeat_interleave(self.model.hidden_dim // self.model.mem_dim, dim=1)      # [n, R k, M]
        return tokens, torch.cat([map_code.flatten(1, 2), code], dim=1)

    def _decode(self, features, top, points=None):
        """Masks and scores from features of which the top level is `top`, and the memory they leave behind."""
        model, (fine, middle, raw) = self.model, features
        *_, logits, full, pointer, score = model._forward_sam_heads(
            top, points, high_res_features=[fine, middle], multimask_output=model._use_multimask(points is not None, points))
        memory, _ = model._encode_new_memory([raw.flatten(2).permute(2, 0, 1)], [raw.shape[2:]], full, score,
                                             is_mask_from_pts=points is not None)              # [n, M, S / 16, S / 16]
        return Seen(logits[:, 0], score[:, 0], memory.flatten(2).mT, pointer.view(len(raw), -1, model.mem_dim))


class Lookout:
    """Features of the frames of B clips, each encoded once: prompted ones are kept, others made in passing, a few at a time."""

    def __init__(self, tracker, clips, owner, objects):
        """clips: B lists of pictures; objects: N dicts by prompted frame; owner: N clips (by place) that they are in."""
        self.tracker, self.clips, self.owner, self.kept = tracker, clips, owner, {}
        self.near = [{} for _ in clips]
        for part in _parts(sorted({(owner[n], t) for n, boxes in enumerate(objects) for t in boxes}), AHEAD):
            self.kept |= self._encode(part)

    def __call__(self, objects, times):
        """Levels [n, C, s, s] of n objects' frames; what is not kept has to be asked for in time's order."""
        levels = []
        for c, t in ((self.owner[n], t) for n, t in zip(objects, times)):
            if (c, t) not in self.kept and (c, t) not in self.near[c]:
                coming = [(c, s) for s in range(t, min(t + AHEAD, len(self.clips[c])))]
                self.near[c] = self._encode([frame for frame in coming if frame not in self.kept])
            levels.append(self.kept.get((c, t)) or self.near[c][c, t])
        return [torch.stack(level) for level in zip(*levels)]

    def _encode(self, frames):
        """{(clip, time): levels} of some frames."""
        pictures = torch.stack([square_picture(self.clips[c][t], self.tracker.side) for c, t in frames])
        return dict(zip(frames, zip(*self.tracker.encode(pictures.to(self.tracker.model.device)))))


def square_picture(image, side):
    """RGB PIL image -> what SAM2 sees of it, [3, side, side] float, normalised."""
    pixels = torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _parts(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def build_sam2(config):
    """The model of a SAM2 config (see Tracker.from_pretrained), random weights, evaluation mode."""
    package = Path(sam2.__file__).parent
    found = [p for p in (Path(config), package / config, package / f"configs/sam2.1/{config}.yaml") if p.is_file()]
    if not found:
        known = ", ".join(sorted(p.stem for p in package.glob("configs/sam2.1/*.yaml")))
        raise FileNotFoundError(f"no such SAM2 config: {config} (a yaml file, or one of: {known})")
    try:
        settings = OmegaConf.merge(PREDICTOR, OmegaConf.load(found[0]).model)
        settings["_target_"] = "sam2.sam2_video_predictor.SAM2VideoPredictor"
        return hydra.utils.instantiate(settings).eval()
    except (yaml.YAMLError, OmegaConfBaseException, HydraException, ValueError) as error:
        raise BadInput(f"not a SAM2 config, a yaml with the key model: {found[0]} ({one_line(error)})") from None


def find_config(weights):
    """The config that goes with a file of weights: the config.yaml beside it, else the one its published name tells
    (sam2.1_hiera_large.pt -> sam2.1_hiera_l)."""
    beside = Path(weights).parent / "config.yaml"
    if beside.is_file():
        return str(beside)
    name = Path(weights).stem
    for long, short in (("_tiny", "_t"), ("_small", "_s"), ("_base_plus", "_b+"), ("_large", "_l")):
        name = name.removesuffix(long) + short if name.endswith(long) else name
    return name


def track_groups(tracker, clips, boxes):
    """Masks of each of G completions of B clips: B arrays bool [G, T, H, W], of each completion the union over its boxes.

    boxes  B lists of G dicts {frame: [boxes]}. Every box is an object of its own, prompted on its frame (method.md, 1); a box
    that several completions share is tracked once.
    """
    tracked = []
    for clip, group in zip(clips, boxes):
        objects = list(dict.fromkeys((t, box) for found in group for t, many in found.items() for box in many))
        place = {key: n for n, key in enumerate(objects)}
        unions = [[place[t, box] for t, many in found.items() for box in many] for found in group]
        tracked.append((clip.frames, [{t: box} for t, box in objects], unions))
    return tracker.track_clips(tracked)


# ---------------------------------------------------------------------------------------------------------------------
# Both systems on one clip
# ---------------------------------------------------------------------------------------------------------------------
def frames_to_ground(clip, text):
    """{frame: description} of one completion: what System 2 has to find."""
    if clip.task == "vos":
        return keyframes(parse_moments(text, len(clip.frames), clip.fps))
    answer = answer_text(text)
    return {0: answer} if clip.task == "avs" and answer and not is_null(answer) else {}


def segment(policy, system2, processor, tracker, clips, max_new_tokens=1024):
    """Segments B clips: System 1 sees at most 24 frames of each, SAM2 runs over all of them. In a picture (task "image") System 1
    has drawn the box itself.

    Returns for each clip (text, {source frame: description}, {source frame: boxes}, masks bool [T, H, W])."""
    seen = [clip.sampled() for clip in clips]
    inputs = [prompt_inputs(processor, view) for view, _ in seen]
    rows = policy.generate(policy.embed(inputs), 1, max_new_tokens, eos_ids=processor.eos_ids, temperature=0.0)
    texts = [processor.decode(ids) for (ids,) in rows]
    chosen = [{indices[t]: what for t, what in frames_to_ground(view, text).items()}
              for text, (view, indices) in zip(texts, seen)]
    boxes = [found for found, in ground(system2, processor, clips, [[frames] for frames in chosen])]
    for clip, x, text, found in zip(clips, inputs, texts, boxes):
        if clip.task == "image":
            found |= {0: [to_source(box, x.scale, clip.size) for box in parse_boxes(answer_text(text), most=1)]}
    masks = track_groups(tracker, clips, [[found] for found in boxes])
    return [(text, frames, found, mask) for text, frames, found, (mask,) in zip(texts, chosen, boxes, masks)]


def overlay(picture, mask, boxes=()):
    """RGB PIL picture with the mask in red, its outline and the given boxes drawn in."""
    pixels = np.array(picture).astype(np.float32)
    pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array([255, 40, 40])
    edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    pixels[edge] = (255, 255, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for box in boxes:
        draw.rectangle(box, outline=(60, 255, 60), width=max(1, image.width // 200))
    return image


def write_result(out, clip, text, chosen, boxes, masks):
    """masks/00000.png ... at source size, overlay.webp (animated), answer.json."""
    os.makedirs(os.path.join(out, "masks"), exist_ok=True)
    for old in Path(out, "masks").glob("*.png"):             # of a longer clip, perhaps
        old.unlink()
    pictures = []
    for t, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(os.path.join(out, "masks", f"{t:05d}.png"))
        picture = overlay(clip.frames[t], mask, boxes.get(t, ()))
        picture.thumbnail((640, 640))
        pictures.append(picture)
    pictures[0].save(os.path.join(out, "overlay.webp"), save_all=True, append_images=pictures[1:], loop=0,
                     duration=round(1000 / clip.fps))
    found = [dict(frame=t, time=t / clip.fps, description=what, boxes=boxes[t]) for t, what in chosen.items()]
    reasoning = text.partition("<think>")[2].partition("</think>")[0]
    with open(os.path.join(out, "answer.json"), "w") as file:
        json.dump(dict(clip=clip.name, query=clip.query, reasoning=reasoning, answer=answer_text(text), text=text,
                       keyframes=found), file, indent=1)


def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="video file or folder of frames; without it a toy clip is made")
    parser.add_argument("--query", help="what to segment")
    parser.add_argument("--sound", help="wav file; by default the video's own soundtrack")
    parser.add_argument("--index", type=at_least(0), default=0, help="which toy clip, where no video is given")
    parser.add_argument("--policy", default=TOY_POLICY, help="directory of a Thinker, or of a full Qwen2.5-Omni")
    parser.add_argument("--sam2", help="config, a yaml file or a name inside the package sam2; default: told by the weights' name")
    parser.add_argument("--sam2_weights", default=TOY_SAM2)
    parser.add_argument("--out", default="out/segment")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    if a.video and not a.query:
        parser.error("--video needs a --query")
    if a.sound and not a.video:
        parser.error("--sound needs a --video")
    try:
        clip = toy_clip("test", a.index) if a.video is None else video_clip(a.video, a.query, a.sound)
        if a.query:
            clip.query = a.query
        dtype = torch.bfloat16 if a.device.startswith("cuda") else torch.float32
        processor, policy = Processor(a.policy), Thinker.from_pretrained(a.policy, dtype, a.device)
        tracker = Tracker.from_pretrained(a.sam2 or find_config(a.sam2_weights), a.sam2_weights, a.device)
        (text, chosen, boxes, masks), = segment(policy, policy, processor, tracker, [clip], a.max_new_tokens)
        write_result(a.out, clip, text, chosen, boxes, masks)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    print(f"query: {plain(clip.query)}\n{text}\nboxes: {boxes}\nwritten: {a.out}/answer.json, overlay.webp and {len(masks)} "
          f"masks of {masks.shape[2]} x {masks.shape[1]} pixels, {masks.any((1, 2)).sum()} of them not empty")


def video_clip(path, query, sound):
    """The clip of a video file or a folder of frames, with the sound of a wav file or else of the video."""
    frames, fps = open_video(path)
    if sound is None and os.path.isfile(path):
        heard = read_sound(path)
    else:
        heard = None if sound is None else read_sound(sound)
    if sound is not None and heard is None:
        raise BadInput(f"no sound in: {sound}")
    return Clip(path, frames, query, fps, heard)


def device(text):
    """An argparse type: cpu, or cuda where there is one."""
    if text != "cpu" and not (text == "cuda" and torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"must be cpu, or cuda where there is such a GPU, not {text}")
    return text


if __name__ == "__main__":
    main()
