"""Boxes on keyframes (System 2), masks on every frame (SAM2), and both after System 1 on a clip.

    keyframes {t: description} -- ground --> boxes {t: [box]} -- Tracker --> masks [T, H, W]

A System 2 from a file may draw masks. Each is a `Mask`: a box to everybody but the Tracker.

As a program it segments one video, a file or a folder of frames. Without --video it makes a toy clip.

    python segment.py --video V --query Q --policy DIR --sam2_weights FILE --out DIR

Of a folder of videos, each is done by itself, into a folder of its name in DIR.
"""
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from trust.errors import BadInput, fail
from trust.options import (
    MOST_FRAMES,
    Parser,
    add_model_options,
    at_least,
    check_given,
    check_models,
    check_out,
    check_system2,
    reference_folder,
)
from trust.plugged import plugged
from trust.program import begin_program, tell


# ---- options of the program ------------------------------------------------------------------------
def read_options(arguments: list[str] | None = None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--video", metavar="PATH",
        help="a video file, a folder of frames, or a folder of videos; without it a toy clip is made")
    add("--query", help="what to segment; by default that of the toy clip")
    add("--sound", metavar="FILE", help="wav file; by default the video's own soundtrack")
    add("--index", type=at_least(0), default=0, help="which toy clip, if no video is given")
    add_model_options(parser)
    add("--out", metavar="DIR", default="out/segment", help="folder of all that is written")
    options = parser.parse_args(arguments)
    if options.video and not options.query:
        parser.error("--video needs a --query")
    if options.sound and not options.video:
        parser.error("--sound needs a --video")
    try:
        if options.video:
            check_given("video", options.video, folder=True)
        if options.sound:
            check_given("sound", options.sound)
        check_models(options)
        check_out(options.out)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_options()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sam2.modeling.sam2_utils import get_1d_sine_pe
from tqdm import tqdm

from benchmarks.media import video_clip
from benchmarks.results import interrupted, listed_videos, told_alone, write_results
from benchmarks.toy import toy_clip
from data import (
    Box,
    Clip,
    Processor,
    check_text,
    frames_to_ground,
    grounding_prompt,
    own_boxes,
    parse_boxes,
    plain,
    prompt_inputs,
    to_source,
)
from model import Thinker
from rewards import overlap
from trust.masks import Mask, square_masks
from trust.sam2_config import build_sam2, find_config
from trust.weights import load_weights


# Most tokens of System 2's answer.
GROUNDING_TOKENS = 128

# Pictures at source size and descriptions, one each -> boxes or Masks in source pixels of each picture.
System2 = Callable[[list[Image.Image], list[str]], list[list[Box]]]


# ---- System 2: descriptions of keyframes -> boxes --------------------------------------------------
def ground(system2: System2, clips: list[Clip], chosen: list) -> list:
    """Boxes of what each completion describes on its keyframes. System 2 answers equal requests once.

    chosen: for each of B clips a list over completions of {frame: description}.
    Returns lists of the same form, with boxes in source pixels instead of the description: {frame: [box]}.
    """
    pictures = {}    # (clip, frame): its picture, read once
    requests = {}    # (clip, frame, description): the same picture
    for c, group in enumerate(chosen):
        for completion in group:
            for t, description in completion.items():
                if (c, t) not in pictures:
                    pictures[c, t] = clips[c].frames[t]
                requests[c, t, description] = pictures[c, t]
    boxes = {}
    if requests:
        descriptions = [description for _, _, description in requests]
        answers = system2(list(requests.values()), descriptions)
        boxes = dict(zip(requests, answers))

    grounded = []
    for c, group in enumerate(chosen):
        grounded.append([])
        for completion in group:
            frames = {}
            for t, description in completion.items():
                frames[t] = boxes[c, t, description]
            grounded[c].append(frames)
    return grounded


def thinker_system2(
    thinker: Thinker,
    processor: Processor,
    max_new_tokens: int = GROUNDING_TOKENS,
) -> System2:
    """System 2 by a Thinker. It writes the boxes as text, greedily, for all requests in one batch.

    If several requests share a picture object, that is encoded once.
    """
    def find_boxes(pictures, descriptions):
        inputs = []
        first = {}    # id of a picture: Inputs of its first request
        for picture, description in zip(pictures, descriptions):
            like = first.get(id(picture))
            x = processor.image_inputs(grounding_prompt(description), picture, like=like)
            first.setdefault(id(picture), x)
            inputs.append(x)
        prompts = thinker.embed(inputs)
        completions = thinker.generate(prompts, 1, max_new_tokens, eos_ids=processor.eos_ids, temperature=0.0)
        boxes = []
        for picture, x, (ids,) in zip(pictures, inputs, completions):
            parsed = parse_boxes(processor.decode(ids))
            size = picture.height, picture.width
            boxes.append([to_source(box, x.scale, size) for box in parsed])
        return boxes
    return find_boxes


def load_system2(
    name: str,
    policy: Thinker,
    processor: Processor,
    dtype: torch.dtype,
    device,
    mask_prompt: bool = True,
) -> System2:
    """System 2 by its name: "policy", "reference DIR" (another Thinker) or "FILE.py" (see `plugged`).

    mask_prompt: whether masks of a file stay masks, or become boxes.
    Raises FileNotFoundError or BadInput, naming what is missing or unknown.
    """
    check_system2(name)
    folder = reference_folder(name)
    if folder:
        policy = Thinker.from_pretrained(folder, dtype, device)
    elif name != "policy":
        return plugged(name, mask_prompt)
    return thinker_system2(policy, processor)


# ---- SAM2: prompts on keyframes -> masks on every frame --------------------------------------------
# Letters: N objects of a call, n of a batch, C clips, G unions of a clip, T frames, H W pixels of the source,
# S side of the square picture that SAM2 sees, h w = S / 4, L = (S / 16)^2 places, D width of the features (D'
# of each level), M width of the memory, k = D / M tokens of a pointer, A maps and R pointers of a memory.

# At S = 1024 each object attends from 4096 places to some 29 thousand memory tokens.
OBJECTS_AT_ONCE = 32
FRAMES_AT_ONCE = 8
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Options of every SAM 2.1 model that decide what a frame attends to. `Memory` and `Tracker` assume them.
SAM21 = {
    "directly_add_no_mem_embed": True,
    "use_high_res_features_in_sam": True,
    "use_obj_ptrs_in_encoder": True,
    "add_tpos_enc_to_obj_ptrs": True,
    "proj_tpos_enc_in_obj_ptrs": True,
    "use_signed_tpos_enc_to_obj_ptrs": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "max_cond_frames_in_attn": -1,
    "memory_temporal_stride_for_eval": 1,
    "non_overlap_masks_for_mem_enc": False,
    "use_mask_input_as_output_without_sam": True,
}

class Tracked(NamedTuple):
    """SAM2's output for n objects, each on one frame."""
    logits: torch.Tensor     # [n, h, w] of the mask; -1024 everywhere if the object is not seen
    score: torch.Tensor      # [n] positive if the object is seen
    map: torch.Tensor        # [n, L, M] memory of the frame and the mask on it
    pointer: torch.Tensor    # [n, k, M] memory of what the object is


@dataclass
class Memory:
    """The memory of one object, by frame."""
    prompted: dict = field(default_factory=dict)    # t: (map, pointer) of a prompted frame; all are kept
    maps: dict = field(default_factory=dict)        # t: map of a tracked frame; only recent ones are kept
    pointers: dict = field(default_factory=dict)    # t: pointer of a tracked frame; older ones than of maps

    def recall(self, t, most_maps, most_pointers):
        """What frame t attends to: (tokens of A maps and R pointers, ages of the maps, ages of the pointers).

        Ages are in frames. Maps and pointers of tracked frames are forgotten at the ages `most_maps` and
        `most_pointers`. Maps of prompted frames have no time: their age is given as 0. A pointer of a
        prompted frame is used on that frame and later.
        """
        self.maps = {s: kept for s, kept in self.maps.items() if t - s < most_maps}
        self.pointers = {s: kept for s, kept in self.pointers.items() if t - s < most_pointers}
        tokens = [prompted_map for prompted_map, _ in self.prompted.values()]
        tokens += self.maps.values()
        map_ages = [0] * len(self.prompted) + [t - s for s in self.maps]
        pointer_ages = []
        for s, (_, pointer) in self.prompted.items():
            if s <= t:
                tokens.append(pointer)
                pointer_ages.append(t - s)
        tokens += self.pointers.values()
        pointer_ages += [t - s for s in self.pointers]
        return tokens, map_ages, pointer_ages


class Tracker:
    """SAM2, frozen: boxes and Masks on keyframes -> masks on every frame.

    SAM2's own video predictor tracks one object after the other. Here all objects share one batch and each
    frame is encoded once. The result is the same. Gradients pass through all methods but `track`,
    `track_clips` and `follow`.
    """

    def __init__(self, model):
        """model: a SAM2Base in evaluation mode. Raises BadInput if it is no SAM 2.1 model."""
        other = [name for name, value in SAM21.items() if getattr(model, name) != value]
        if other:
            raise BadInput(f"not a SAM 2.1 model, it differs in: {', '.join(other)}")
        self.model = model
        self.side = model.image_size
        size = model.sam_prompt_encoder.image_embedding_size
        places = torch.empty(1, 1, *size, device=model.device)
        top_place = model.image_encoder.neck.position_encoding(places)
        map_place = model.memory_encoder.position_encoding(places)
        self.top_place = top_place.flatten(2).permute(2, 0, 1)    # [L, 1, D]
        self.map_place = map_place.flatten(2).mT                  # [1, L, M]
        self.mean = torch.tensor(MEAN, device=model.device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=model.device).view(3, 1, 1)

    @classmethod
    def from_pretrained(cls, config, weights, device="cpu") -> "Tracker":
        """SAM2 from its files.

        config   a yaml file, or the name of one inside the package sam2, such as sam2.1_hiera_l. None or "":
                 the one that belongs to the weights
        weights  a file with {"model": state_dict}, as published
        Raises FileNotFoundError or BadInput, naming the file.
        """
        config = config or find_config(weights)
        model = build_sam2(config)
        load_weights(model, weights, config)
        return cls(model.to(device))

    def track(self, frames, objects, unions=None) -> np.ndarray:
        """Masks of N objects on all T frames, bool [N, T, H, W] at source size; objects may overlap.

        frames: T pictures of one size, read as they are needed.
        objects: N dicts {frame: (x1, y1, x2, y2) in source pixels, or a Mask of any size}, none of them
            empty. ValueError if not.
        unions: G lists of numbers of objects. Then the result is the union of each list, [G, T, H, W], and
            the masks of single objects are kept for one frame only.
        """
        return self.track_clips([(frames, objects, unions)])[0]

    def track_clips(self, clips) -> list[np.ndarray]:
        """`track` for C clips (frames, objects, unions) at once: objects of all clips share the batches."""
        masks = [None for _ in clips]
        for c, t, found in self.follow(clips):
            if t == 0:
                G, height, width = found.shape
                masks[c] = np.empty((G, len(clips[c][0]), height, width), bool)
            # Waits for the device.
            masks[c][:, t] = found.cpu()
        return masks

    @torch.inference_mode()
    def follow(self, clips):
        """`track_clips` frame by frame: yields (c, t, masks [G, H, W] of frame t of clip c) in order of time.

        The masks are on the device, and the host waits for none of them. Memory does not grow with T: of
        frames and masks only the last few are held.
        """
        boxes = []     # of all N objects: {frame: box in the square picture, or a Mask}
        owner = []     # the clip that each object is in
        sizes = []     # (width, height) of each clip
        for c, (frames, objects, _) in enumerate(clips):
            sizes.append(frames[0].size)
            boxes += self.square_boxes(objects, len(frames), *sizes[c])
            owner += [c] * len(objects)
        lengths = [len(clips[c][0]) for c in owner]
        device = self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            features = FrameFeatures(self, [frames for frames, _, _ in clips], owner, boxes)
            steps = self.run(features, boxes, lengths)
            nothing = torch.empty(0, 1, 1, device=self.model.device), None
            for t in range(max((len(frames) for frames, _, _ in clips), default=0)):
                logits, _ = next(steps, nothing)
                # Objects are in the order of their clips.
                present = [c for c, (frames, _, _) in enumerate(clips) if t < len(frames)]
                split = logits.split([len(clips[c][1]) for c in present])
                for c, part in zip(present, split):
                    masks = union_masks(part, clips[c][2], sizes[c])
                    # Whoever takes the masks works as before. Casts of the weights are kept meanwhile.
                    with torch.autocast(device, enabled=False):
                        yield c, t, masks

    def square_boxes(self, objects, T, width, height):
        """Boxes {frame: box in source pixels} of the objects of a clip, in pixels of the square picture.

        A Mask stays as it is: it is resized when it is needed.
        """
        scale = np.array([self.side / width, self.side / height] * 2)
        scaled = []
        for n, boxes in enumerate(objects):
            if not boxes or min(boxes) < 0 or max(boxes) >= T:
                raise ValueError(f"object {n} needs boxes on frames 0 to {T - 1}, not on {sorted(boxes)}")
            scaled.append({t: box if isinstance(box, Mask) else box * scale for t, box in boxes.items()})
        return scaled

    def run(self, features, objects, lengths):
        """Yields for t = 0 ... max(lengths) - 1: logits [n, h, w] and scores [n] of the objects whose clip
        has a frame t.

        features: (objects, frames) -> three levels [n, D', s, s] of n pairs, s = S / 4, S / 8, S / 16.
        objects: N dicts {frame: box in pixels of the square picture, or a Mask}. lengths: T of the clip of
            each object.
        """
        memories = [Memory() for _ in objects]
        answers = {}    # (object, frame): logits and score
        # 1. Prompted frames, each by itself, like a single picture. Boxes and masks take different ways.
        boxed = []
        masked = []
        for n, prompts in enumerate(objects):
            for t, prompt in prompts.items():
                way = masked if isinstance(prompt, Mask) else boxed
                way.append((n, t))
        for pairs in parts(boxed, OBJECTS_AT_ONCE) + parts(masked, OBJECTS_AT_ONCE):
            prompts = [objects[n][t] for n, t in pairs]
            tracked = self.prompt(features(*zip(*pairs)), prompts)
            for (n, t), logits, score, *memory in zip(pairs, *tracked):
                answers[n, t] = logits, score
                memories[n].prompted[t] = memory
        # 2. All other frames in order of time. They attend to all prompted frames, later ones too.
        for t in range(max(lengths, default=0)):
            present = [n for n, T in enumerate(lengths) if T > t]
            for rows in parts([n for n in present if t not in objects[n]], OBJECTS_AT_ONCE):
                levels = features(rows, [t] * len(rows))
                spans = [lengths[n] for n in rows]
                top = self.attend(levels[-1], [memories[n] for n in rows], t, spans)
                tracked = self.decode(levels, top)
                for n, logits, score, new_map, pointer in zip(rows, *tracked):
                    answers[n, t] = logits, score
                    memories[n].maps[t] = new_map
                    memories[n].pointers[t] = pointer
            logits, scores = zip(*[answers.pop((n, t)) for n in present])
            yield torch.stack(logits), torch.stack(scores)

    def encode(self, pictures):
        """Features of B pictures [B, 3, S, S], normalised: three levels [B, D', s, s]."""
        return self.model.forward_image(pictures)["backbone_fpn"]

    def prompt(self, features, prompts) -> Tracked:
        """n objects in n pictures, from n boxes, or n Masks, alone."""
        device = self.model.device
        if isinstance(prompts[0], Mask):
            sent = [send(torch.from_numpy(mask.pixels), device) for mask in prompts]
            return self.decode(features, features[-1], masks=square_masks(sent, self.side))
        boxes = torch.tensor(np.array(prompts))
        corners = send(boxes.float(), device).view(-1, 2, 2)
        # 2 and 3 are SAM2's labels of the two corners.
        labels = torch.arange(2, 4, device=device).repeat(len(boxes), 1)
        top = features[-1] + self.model.no_mem_embed.view(1, -1, 1, 1)
        return self.decode(features, top, dict(point_coords=corners, point_labels=labels))

    def attend(self, top, memories, t, lengths):
        """The top features [n, D, s, s] of n frames t after each has attended to the memory of its object.

        memories: one for each object. lengths: T of each object's clip.
        SAM2's attention takes no mask, so objects with equally large memories form one batch. With one prompt
        for each object there are four batches at most: memories differ in whether its frame comes later, is
        recent, or is long past.
        """
        most_pointers = self.model.max_obj_ptrs_in_encoder
        recalled = [memory.recall(t, self.model.num_maskmem, most_pointers) for memory in memories]
        batches = {}    # (A, R): the objects that recall as much
        for n, (_, map_ages, pointer_ages) in enumerate(recalled):
            amounts = len(map_ages), len(pointer_ages)
            batches.setdefault(amounts, []).append(n)

        mixed = [None] * len(top)
        for (A, _), rows in sorted(batches.items()):
            spans = [min(lengths[n], most_pointers) for n in rows]
            tokens, codes = self.memory_tokens([recalled[n] for n in rows], spans)
            # No list is an index: it would be copied to the device, and the host would wait.
            own = torch.stack([top[n] for n in rows]).flatten(2).mT.contiguous()    # [n, L, D]
            attended = self.model.memory_attention(
                curr=own.transpose(0, 1),
                curr_pos=self.top_place,
                memory=tokens.transpose(0, 1),                 # [A L + R k, n, M]
                memory_pos=codes.transpose(0, 1),
                num_obj_ptr_tokens=tokens.shape[1] - A * self.map_place.shape[1])
            attended = attended.permute(1, 2, 0).unflatten(2, top.shape[2:]).float()
            for n, features in zip(rows, attended):
                mixed[n] = features
        return torch.stack(mixed)

    def memory_tokens(self, recalled, spans):
        """Tokens [n, A L + R k, M] of n equally large memories, and their codes of place and time.

        spans: for each object, how many frames the code of time covers.
        """
        model = self.model
        tokens, map_ages, pointer_ages = zip(*recalled)
        tokens = torch.stack([torch.cat(kept) for kept in tokens])
        map_ages = send(torch.tensor(map_ages), tokens.device)            # [n, A]
        pointer_ages = send(torch.tensor(pointer_ages), tokens.device)    # [n, R]
        spans = send(torch.tensor(spans), tokens.device)[:, None]         # [n, 1]

        # Age 0, of a prompted frame, takes the last code.
        age_codes = model.maskmem_tpos_enc[map_ages - 1].squeeze(2)            # [n, A, 1, M]
        map_codes = self.map_place[:, None] + age_codes                        # [n, A, L, M]
        sines = get_1d_sine_pe(pointer_ages / (spans - 1), model.hidden_dim)   # [n, R, D]
        pointer_codes = model.obj_ptr_tpos_proj(sines)                         # [n, R, M]
        k = model.hidden_dim // model.mem_dim
        pointer_codes = pointer_codes.repeat_interleave(k, dim=1)              # [n, R k, M]
        return tokens, torch.cat([map_codes.flatten(1, 2), pointer_codes], dim=1)

    def decode(self, features, top, points=None, masks=None) -> Tracked:
        """The masks of n objects, and what goes into their memories.

        features: three levels. top: replaces the last level for the masks. On prompted frames, points: the
        boxes' corners and labels; or masks: [n, 1, S, S], which SAM2 takes as its own output.
        """
        model = self.model
        fine, middle, raw = features
        prompted = points is not None or masks is not None
        if masks is None:
            *_, logits, full, pointer, score = model._forward_sam_heads(
                top, points, high_res_features=[fine, middle],
                multimask_output=model._use_multimask(prompted, points))
        else:
            *_, logits, _, pointer, score = model._use_mask_as_output(top, [fine, middle], masks)
            # SAM2's predictor remembers what is left of a mask at h x w.
            full = F.interpolate(logits, masks.shape[2:], mode="bilinear")
        memory, _ = model._encode_new_memory(
            [raw.flatten(2).permute(2, 0, 1)], [raw.shape[2:]], full, score, is_mask_from_pts=prompted)
        pointer = pointer.view(len(raw), -1, model.mem_dim)
        return Tracked(logits[:, 0], score[:, 0], memory.flatten(2).mT, pointer)


class FrameFeatures:
    """Features of the frames of C clips, each encoded once, FRAMES_AT_ONCE at a time.

    Prompted frames are kept. The others are encoded a little ahead and then dropped.
    """

    def __init__(self, tracker, clips, owner, objects):
        """clips: C lists of pictures. objects: N dicts by prompted frame. owner: the clip of each object."""
        self.tracker = tracker
        self.clips = clips
        self.owner = owner
        self.ahead = [{} for _ in clips]
        self.prompted = {}    # (clip, frame): three levels [D', s, s]; `ahead` alike
        frames = set()
        for c, boxes in zip(owner, objects):
            frames.update((c, t) for t in boxes)
        for part in parts(sorted(frames), FRAMES_AT_ONCE):
            self.prompted |= self.encode(part)

    def __call__(self, objects, times):
        """Three levels [n, D', s, s] of n objects' frames. Frames without prompts come in order of time."""
        levels = [self.levels(self.owner[n], t) for n, t in zip(objects, times)]
        return [torch.stack(level) for level in zip(*levels)]

    def levels(self, c, t):
        """Three levels [D', s, s] of frame t of clip c."""
        if (c, t) in self.prompted:
            return self.prompted[c, t]
        if (c, t) not in self.ahead[c]:
            end = min(t + FRAMES_AT_ONCE, len(self.clips[c]))
            frames = [(c, s) for s in range(t, end) if (c, s) not in self.prompted]
            self.ahead[c] = self.encode(frames)
        return self.ahead[c][c, t]

    def encode(self, frames):
        """{(clip, frame): three levels} of some frames."""
        tracker = self.tracker
        pictures = torch.stack([square_picture(self.clips[c][t], tracker.side) for c, t in frames])
        # Bytes are sent: a quarter of what floats take.
        pictures = send(pictures, tracker.model.device) / 255
        levels = tracker.encode((pictures - tracker.mean) / tracker.std)
        return dict(zip(frames, zip(*levels)))


def square_picture(image, side):
    """RGB PIL image -> what SAM2 sees of it, uint8 [3, side, side]."""
    pixels = np.array(image.resize((side, side)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def send(tensor, device):
    """A tensor of the CPU on the device. The host does not wait: a GPU fetches it from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def parts(items, size):
    """A list cut into lists of at most `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def union_masks(logits, unions, size):
    """What each of G unions covers of n objects with logits [n, h, w]: bool [G, H, W], on their device.

    unions: None for each object by itself. size: (width, height).
    """
    if unions is None:
        unions = [[n] for n in range(len(logits))]
    width, height = size
    objects = []    # n masks [H, W]
    for part in logits.split(OBJECTS_AT_ONCE):
        scaled = F.interpolate(part[:, None], (height, width), mode="bilinear")[:, 0]
        objects.extend(scaled > 0)
    masks = torch.zeros(len(unions), height, width, dtype=torch.bool, device=logits.device)
    for mask, union in zip(masks, unions):
        for n in union:
            mask |= objects[n]
    return masks


def track_similarity(tracker: Tracker, clips: list[Clip], boxes: list) -> list[np.ndarray]:
    """J [G, T] of what `track_groups` gives for G completions of each of B clips, against the true masks.

    Pixels are counted on the device and no mask is copied from it. The host waits once a clip.
    """
    counts = [[] for _ in clips]    # of each clip T tensors [2, G]: pixels in both masks, and in either
    for c, t, masks in tracker.follow(group_requests(clips, boxes)):
        true = send(torch.from_numpy(clips[c].masks[:, t].any(0)), masks.device)
        pairs = torch.stack([masks & true, masks | true])    # [2, G, H, W]
        # int32, because a CPU adds int64 five times as slowly.
        counts[c].append(pairs.sum((2, 3), dtype=torch.int32))
    return [overlap(*torch.stack(frames, -1).cpu().numpy()) for frames in counts]


def track_groups(tracker: Tracker, clips: list[Clip], boxes: list) -> list[np.ndarray]:
    """Masks of G completions of each of B clips: bool [G, T, H, W], the union over a completion's boxes.

    boxes: for each clip a list over completions of {frame: [box or Mask]} in source pixels. Each is an object
    of its own, prompted on its frame. One that several completions share is tracked once.
    """
    return tracker.track_clips(group_requests(clips, boxes))


def group_requests(clips: list[Clip], boxes: list) -> list:
    """What `track_groups` asks the tracker for each clip: (frames, objects, unions)."""
    requests = []
    for clip, group in zip(clips, boxes):
        numbers = {}    # (frame, box): its object's number
        unions = []
        for completion in group:
            union = []
            for t, frame_boxes in completion.items():
                for box in frame_boxes:
                    union.append(numbers.setdefault((t, box), len(numbers)))
            # A box that is named twice is one object.
            unions.append(list(dict.fromkeys(union)))
        objects = [{t: box} for t, box in numbers]
        requests.append((clip.frames, objects, unions))
    return requests


# ---- both systems on clips -------------------------------------------------------------------------
@dataclass
class Answer:
    """The answer of the two systems to one clip. Frames are those of the source."""
    text: str            # System 1's completion
    keyframes: dict      # {frame: description}
    boxes: dict          # {frame: [boxes or Masks in source pixels]}


def answer_clips(
    policy: Thinker,
    system2: System2,
    processor: Processor,
    clips: list[Clip],
    max_new_tokens: int = 1024,
    most_frames: int = MOST_FRAMES,
) -> list[Answer]:
    """The answers to B clips. System 1 sees at most `most_frames` frames of each."""
    views = [clip.sampled(most_frames) for clip in clips]
    inputs = [prompt_inputs(processor, view) for view, _ in views]
    prompts = policy.embed(inputs)
    completions = policy.generate(prompts, 1, max_new_tokens, eos_ids=processor.eos_ids, temperature=0.0)
    texts = [processor.decode(ids) for (ids,) in completions]

    chosen = []
    for (view, indices), text in zip(views, texts):
        described = frames_to_ground(view, text)
        chosen.append({indices[t]: description for t, description in described.items()})
    boxes = ground(system2, clips, [[frames] for frames in chosen])
    # In a picture (task "image") System 1 draws the box itself.
    for clip, x, text, (frames,) in zip(clips, inputs, texts, boxes):
        own = own_boxes(clip, text)
        if own:
            frames[0] = [to_source(box, x.scale, clip.size) for box in own]
    return [Answer(text, frames, found) for text, frames, (found,) in zip(texts, chosen, boxes)]


def follow_answers(tracker: Tracker, clips: list[Clip], answers: list[Answer]):
    """Yields (c, t, mask [H, W] of frame t of clip c) in order of time, on all T frames of the source."""
    requests = group_requests(clips, [[answer.boxes] for answer in answers])
    for c, t, (mask,) in tracker.follow(requests):
        # Waits for the device.
        yield c, t, mask.cpu().numpy()


# ---- the program -----------------------------------------------------------------------------------
def chosen_device(name: str) -> str:
    """The device of the option --device: auto is cuda where there is one. Raises BadInput without a GPU."""
    there = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if there else "cpu"
    if name == "cuda" and not there:
        raise BadInput("--device cuda: torch finds no such GPU here")
    return name


def load_models(options) -> tuple[Thinker, System2, Processor, Tracker]:
    """(policy, system2, processor, tracker) by the options of `add_model_options`, as `segment` takes them.

    Raises FileNotFoundError or BadInput, naming what is missing or malformed.
    """
    device = chosen_device(options.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = Processor(options.policy, options.video_tokens, options.image_tokens)
    policy = Thinker.from_pretrained(options.policy, dtype, device)
    tracker = Tracker.from_pretrained(options.sam2, options.sam2_weights, device)
    system2 = load_system2(options.system2, policy, processor, dtype, device, options.mask_prompt)
    return policy, system2, processor, tracker


def open_clip(options, video: str | None) -> Clip:
    """The clip of a video and the query; without a video that of the toy."""
    if video is None:
        clip = toy_clip("test", options.index)
    else:
        clip = video_clip(video, options.query, options.sound)
    if options.query:
        clip.query = check_text(options.query, "--query")
    return clip


def segment_clip(options, clip, out, policy, system2, processor, tracker):
    """Writes the answer and the masks of one clip to OUT, and prints the reasoning."""
    answer, = answer_clips(policy, system2, processor, [clip], options.max_new_tokens, options.frames)
    tell(f"query: {plain(clip.query)}\n{answer.text}\nboxes: {answer.boxes}")
    masks = follow_answers(tracker, [clip], [answer])
    seen = write_results(out, clip, answer, (mask for _, _, mask in masks))
    height, width = clip.size
    tell(f"written: {out}/answer.json, overlay.webp, sheet.png and {len(clip.frames)} masks of "
         f"{width} x {height} pixels, {seen} of them not empty")


def main(arguments=None):
    options = read_options(arguments)
    # From here on it raises KeyboardInterrupt, and the masks that are there are counted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    videos = listed_videos(options.video, options.out)
    several = len(videos) > 1
    failed = []
    try:
        models = load_models(options) if several else None
        for video, out in tqdm(videos, "videos", unit="video", disable=not several):
            with told_alone(several, failed):
                clip = open_clip(options, video)
                models = models or load_models(options)
                segment_clip(options, clip, out, *models)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    except KeyboardInterrupt as stop:
        sys.exit(interrupted(stop))
    if failed:
        sys.exit(fail(f"{len(failed)} of {len(videos)} videos have no masks"))


if __name__ == "__main__":
    main()
