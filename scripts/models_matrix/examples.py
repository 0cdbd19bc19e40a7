"""Inputs for any model: what its forward asks for by name, until the dense model takes some."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shrink import sub_configs
from shrink_rules import IMAGE, PATCH, VOCAB, WIDTH

BATCH, LENGTH = 2, 9
Inputs = dict[str, Any]


def text_inputs(model: Any) -> Iterator[Inputs]:
    """Yield what a model of text, sound or pictures may take, the likeliest first."""
    names = set(inspect.signature(model.forward).parameters)
    ids = _ids()
    decoder = {"decoder_input_ids": ids[:, :4]} if "decoder_input_ids" in names else {}
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
    images, values = list(_pictures(model)), []
    if "input_ids" in names or not names & {"pixel_values", "input_values", "input_features"}:
        if getattr(model.config, "is_encoder_decoder", False):
            yield {"input_ids": ids, **decoder}
            ended = torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], 2)], dim=1)
            yield {"input_ids": ended}
        yield {"input_ids": ids}
        yield {"input_ids": ids, **mask, **decoder}
        if "bbox" in names:
            yield {"input_ids": ids, "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long)}
        if "pixel_values" in names:
            values += [{"input_ids": ids[:1], **mask_of(ids[:1], mask), **each} for each in images]
    yield from values
    if "pixel_values" in names or "grid_thw" in names:
        for each in images:
            yield each
            yield each | {key: value[:1] for key, value in decoder.items()}
    shaped: dict[str, list[tuple[int, ...]]] = {
        "input_values": [(1, 4000), (1, 16, 128), (1, 128, 16), (1, 1, 4000)],
        "input_features": [
            (1, 16, 128),
            (1, 128, 16),
            (1, 16, 2 * 512),
            (1, 64, 160),
            (1, 80, 128),
        ],
        "pixel_values_videos": [(1, 2, 3, IMAGE, IMAGE), (1, 16, 3, IMAGE, IMAGE)],
        "flattened_patches": [(1, 9, 2 + 3 * PATCH * PATCH), (1, 9, 2 + WIDTH)],
        "past_values": [(1, 64), (1, 64, 1), (1, 32, 1), (1, 512)],
        "audio_features": [(1, 16, 128)],
        "inputs_embeds": [(1, LENGTH, WIDTH)],
        "hidden_states": [(1, LENGTH, WIDTH)],
        "inputs": [(1, LENGTH)],
        "audio_values": [(1, 1, 4000)],
        "spectrogram": [(1, 32, 16)],
        "input_embeds": [(1, LENGTH, WIDTH)],
        "encoder_hidden_states": [(1, LENGTH, WIDTH)],
    }
    for name, shapes in shaped.items():
        if name in names:
            for shape in shapes:
                found = {name: _floats(model, shape)}
                yield found
                yield found | {key: value[:1] for key, value in decoder.items()}
                if "input_ids" in names:
                    yield found | {"input_ids": ids[:1]}


def mask_of(ids: torch.Tensor, mask: Inputs) -> Inputs:
    """Return an attention mask for `ids` where the model takes one."""
    return {"attention_mask": torch.ones_like(ids)} if mask else {}


def image_inputs(model: Any) -> Iterator[Inputs]:
    """Yield text with an image in it, for a model that puts image features among its tokens."""
    owner = next(
        (each for each in (model, getattr(model, "model", None)) if _takes_images(each)), None
    )
    token = next(
        (
            getattr(config, name)
            for config in sub_configs(model.config)
            for name in ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id")
            if isinstance(getattr(config, name, None), int)
        ),
        None,
    )
    if owner is None or token is None:
        return
    taken = inspect.signature(owner.get_image_features).parameters
    reasons = []
    for pictures in _pictures(model):
        given = {key: value for key, value in pictures.items() if key in taken}
        try:
            with torch.no_grad():
                features = owner.get_image_features(**given)
        except Exception as error:
            reasons.append(error)
            continue
        for count in dict.fromkeys((_tokens(features), LENGTH)):
            if not 0 < count < 400:
                continue
            ids = torch.cat([_ids()[:1, :3], torch.full((1, count), token), _ids()[:1, 3:6]], dim=1)
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
            yield found
            kinds = (ids == token).long()
            yield found | {"mm_token_type_ids": kinds}
            yield found | {"token_type_ids": kinds}
    if reasons:
        raise reasons[0]


def _takes_images(owner: Any) -> bool:
    return callable(getattr(owner, "get_image_features", None))


def _tokens(features: Any) -> int:
    """Return how many rows of the text's width there are in image features."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, torch.Tensor):
        return int(features.numel() // features.shape[-1])
    if isinstance(features, list | tuple):
        return sum(_tokens(item) for item in features)
    return 0


def _pictures(model: Any) -> Iterator[Inputs]:
    """Yield one picture in each of the forms that models know."""
    vision = [each for each in sub_configs(model.config) if hasattr(each, "patch_size")]
    config = vision[-1] if vision else model.config
    channels = _number(config, ("num_channels", "in_channels", "in_chans"), 3)
    patch = _number(config, ("patch_size",), PATCH)
    size = _number(config, ("image_size", "img_size", "input_size"), IMAGE)
    names = set(inspect.signature(model.forward).parameters)
    image = _floats(model, (1, channels, size, size))
    extra: Inputs = {}
    if "image_sizes" in names:
        extra["image_sizes"] = torch.tensor([[size, size]])
    steps = _number(config, ("temporal_patch_size",), 1)
    grid = torch.tensor([[1, 4, 4]])
    rows = _floats(model, (16, channels * steps * patch * patch))
    if "grid_thw" in names and "hidden_states" in names:
        yield {"hidden_states": rows, "grid_thw": grid}
    if names & {"image_grid_thw", "grid_thw"}:
        name = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
        yield {"pixel_values": rows, name: grid}
        yield {"pixel_values": rows[None], name: grid}
        yield {"pixel_values": rows.view(16, channels, patch, -1), name: grid}
    if "image_grid_hws" in names:
        yield {"pixel_values": rows.view(16, channels, patch, -1), "image_grid_hws": grid[:, 1:]}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": rows[None],
            "spatial_shapes": grid[:, 1:],
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
    if "image_position_ids" in names or "pixel_position_ids" in names:
        name = "image_position_ids" if "image_position_ids" in names else "pixel_position_ids"
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        yield {"pixel_values": rows[None], name: at.view(1, 16, 2)}
    yield {"pixel_values": image} | extra
    yield {"pixel_values": image}
    if "aspect_ratio_ids" in names:
        yield {
            "pixel_values": image[None, :, None].expand(1, 1, 4, channels, size, size),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        }
    yield {"pixel_values": image[:, None]} | extra
    yield {"pixel_values": image[:, None].expand(1, 2, channels, size, size)} | extra
    yield {"pixel_values": image[:, None].expand(1, 5, channels, size, size)} | extra


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int):
            return value
    return default


def _ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, VOCAB - 64, (BATCH, LENGTH), generator=generator)


def _floats(model: Any, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator).to(model.dtype)


def first_that_runs(model: Any, tries: Iterator[Inputs], run: Callable[..., Any]) -> Inputs | str:
    """Return the first inputs that the model takes, else the first reason why not."""
    reason = last = ""
    while True:
        try:
            inputs = next(tries)
        except StopIteration:
            break
        except Exception as error:  # of making them
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
            break
        try:
            run(model, inputs)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
            last = f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
        else:
            return inputs
    return (
        " ... ".join(dict.fromkeys(filter(None, (reason, last)))) or "there is nothing to give it"
    )
