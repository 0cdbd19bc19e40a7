"""Pipelines of diffusers: packed whole or by component, loaded packed, streamed, equal bits."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner

import endor
from endor.checkpoint import inspect_checkpoint, verify_checkpoint
from endor.cli.main import cli
from endor.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DependencyError,
    EndorError,
    OutputExistsError,
)
from endor.hf import EndorConfig, EndorLinear
from endor.planning import Placement

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = torch.bfloat16
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def clip_tokenizer():
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{item}</w>" for item in LETTERS)]
    vocab = {word: at for at, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    pieces += [(item, -3.0 - at / 100) for at, item in enumerate(["▁", *LETTERS])]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(projection=False):
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5(kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def vae(channels=4, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(64,),
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=16,
        **options,
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=[8, 12, 12],
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def wan():
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5("UMT5"),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )


def unet():
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


KINDS = {"flux": flux, "sd3": sd3, "wan": wan, "unet": unet}
MAIN = {"flux": "transformer", "sd3": "transformer", "wan": "transformer", "unet": "unet"}
CALLS = {
    "flux": {"max_sequence_length": 16, "height": 16, "width": 16},
    "sd3": {"max_sequence_length": 16, "height": 16, "width": 16},
    "wan": {"max_sequence_length": 16, "height": 16, "width": 16, "num_frames": 5},
    "unet": {"height": 16, "width": 16},
}


def parts_of(pipeline):
    return {name: part for name, part in pipeline.components.items() if hasattr(part, "parameters")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that makes a pipeline of a kind, dense and packed, once."""
    made = {}

    def make(kind):
        if kind not in made:
            root = made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            pipeline = KINDS[kind]()
            pipeline.to(BF16)
            pipeline.save_pretrained(root / "dense")
            (root / "dense" / "README.md").write_text("mine")
            endor.pack_checkpoint(root / "dense", root / "packed", threads=1)
        return made[kind]

    return make


def load(path, **options):
    modules = {name: options.pop(name) for name in [*options] if name != "quantization_config"}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=BF16, **options)
    pipeline.register_modules(**modules)  # from_pretrained drops some that are passed
    pipeline.set_progress_bar_config(disable=True)
    for part in parts_of(pipeline).values():
        if not hasattr(part, "endor"):
            for parameter in part.parameters():  # products depend on alignment below 16 bytes
                parameter.data = parameter.data.clone()
    return pipeline


def run(pipeline, kind):
    found = pipeline(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(3),
        return_dict=False,
        **CALLS[kind],
    )[0]
    assert found.isfinite().all()
    return found


def same(left, right):
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def least(kind, path, **options):
    """Return the smallest budget that loads a component, as the refusal of less names it."""
    with pytest.raises(BudgetError) as caught:
        kind.from_pretrained(path, quantization_config=EndorConfig(ram=1), **options)
    return int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])


def names(path):
    return {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline(folders, tmp_path, kind):
    """Packed, verified, unpacked to the same files; loaded, it gives the dense pipeline's bits."""
    root = folders(kind)
    report = verify_checkpoint(root / "packed", against=root / "dense")
    assert report.ok, report.problems
    endor.unpack_checkpoint(root / "packed", tmp_path / "back", threads=1)
    assert names(tmp_path / "back") == names(root / "dense")
    for name in names(root / "dense"):
        if name.endswith(".safetensors"):
            assert (tmp_path / "back" / name).read_bytes() == (root / "dense" / name).read_bytes()
    wanted = run(load(root / "dense"), kind)
    packed = load(root / "packed")
    assert same(run(packed, kind), wanted)
    held = {name: part for name, part in parts_of(packed).items() if hasattr(part, "endor")}
    assert {MAIN[kind], "text_encoder"} <= set(held)
    for part in held.values():
        assert part.endor.weights
    rows = inspect_checkpoint(root / "packed").rows
    assert {row.name.partition("/")[0] for row in rows} == set(held)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_at_the_least_budget(folders, kind):
    root = folders(kind)
    wanted = run(load(root / "dense"), kind)
    loaded, tight = {}, {}
    for name in (MAIN[kind], "text_encoder"):
        family = type(parts_of(load(root / "packed"))[name])
        path = root / "packed" / name
        options = {"dtype": BF16} if name == "text_encoder" else {"torch_dtype": BF16}
        ram = least(family, path, **options)
        config = EndorConfig(ram=ram)
        loaded[name] = family.from_pretrained(path, quantization_config=config, **options)
        units = {unit.name: unit.nbytes for unit in loaded[name].endor.units}
        place = Placement(dict.fromkeys(units, "disk"), max(units.values()))
        config = EndorConfig(placement=place)
        tight[name] = family.from_pretrained(path, quantization_config=config, **options)
    assert same(run(load(root / "packed", **loaded), kind), wanted)
    # So small a model may fit into the staging of that budget whole.
    before = {name: part.endor.ledger.snapshot() for name, part in tight.items()}
    assert same(run(load(root / "packed", **tight), kind), wanted)
    for name, part in tight.items():
        assert part.endor.ledger.since(before[name])["read_bytes"] > 0


def test_options_reach_the_components_of_a_pipeline(folders):
    root = folders("flux")
    wanted = run(load(root / "dense"), "flux")
    quant = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": EndorConfig(context=7), "text_encoder": EndorConfig(batch=3)}
    )
    pipeline = load(root / "packed", quantization_config=quant)
    assert pipeline.transformer.endor_plan.workload.context == 7
    assert pipeline.text_encoder.endor_plan.workload.batch == 3
    assert same(run(pipeline, "flux"), wanted)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
def test_another_dtype(folders, dtype):
    root = folders("sd3")
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
    }
    found = []
    for name in ("dense", "packed"):
        model = diffusers.SD3Transformer2DModel.from_pretrained(
            root / name / "transformer", torch_dtype=dtype
        )
        if name == "dense":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        given = {key: value.to(model.dtype) for key, value in inputs.items()}
        with torch.no_grad():
            found.append(model(**given, timestep=torch.tensor([3.0]), return_dict=False)[0])
    assert found[0].dtype == found[1].dtype == dtype or torch.float32
    assert same(*found)


def test_one_component(folders, tmp_path):
    """Packed by itself, in shards, and saved again; diffusers' own names come back."""
    root = folders("flux")
    dense = diffusers.FluxTransformer2DModel.from_pretrained(root / "dense" / "transformer")
    dense.to(BF16).save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    assert (tmp_path / "dense" / "diffusion_pytorch_model.safetensors.index.json").exists()
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed", threads=1)
    endor.unpack_checkpoint(tmp_path / "packed", tmp_path / "back", threads=1)
    assert names(tmp_path / "back") == names(tmp_path / "dense")
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "packed", torch_dtype=BF16)
    assert sum(isinstance(module, EndorLinear) for module in model.modules()) == 20
    model.save_pretrained(tmp_path / "again")
    assert verify_checkpoint(tmp_path / "again", against=tmp_path / "dense").ok
    with pytest.raises(OutputExistsError):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="quantized model"):  # by diffusers itself
        model.to(torch.float32)
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "third", push_to_hub=True)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=BF16)
    for name, weight in model.endor.weights.items():
        assert same(weight.dense(), again.endor.weights[name].dense())


def test_without_endor_it_is_refused(folders):
    """Never random weights: diffusers does not know the method."""
    code = (
        "import diffusers; diffusers.FluxTransformer2DModel.from_pretrained("
        f"{str(folders('flux') / 'packed' / 'transformer')!r})"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert "Unknown quantization type, got endor" in found.stderr


def test_registered_whichever_is_imported_first(folders):
    path = str(folders("flux") / "packed" / "transformer")
    load_it = f"m = diffusers.FluxTransformer2DModel.from_pretrained({path!r}); m.endor"
    for first in ("import endor, diffusers", "import diffusers, endor"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", f"{first}; {load_it}"], check=True)


def test_the_commands(folders, tmp_path):
    root = folders("unet")

    def invoke(*words):
        return CliRunner().invoke(cli, [str(word) for word in words])

    packed = tmp_path / "packed"
    said = invoke("pack", root / "dense", packed, "--prune", "magnitude", "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["density"] == 0.5
    assert "whole" in invoke("verify", packed).output
    assert "unet/down_blocks.0.attentions.0" in invoke("inspect", packed).output
    assert invoke("unpack", packed, tmp_path / "back").exit_code == 0
    assert invoke("verify", packed, "--against", root / "dense").exit_code == 1
    for words in (["--prune", "wanda"], ["--bits", "4"], ["--include", "*"]):
        refused = invoke("pack", root / "dense", tmp_path / "other", *words)
        assert isinstance(refused.exception, ConfigError), refused.output
    again = invoke("pack", root / "dense", packed)
    assert isinstance(again.exception, OutputExistsError)
    assert not list(tmp_path.glob("other*"))


def test_damage_leaves_nothing(folders, tmp_path):
    shutil.copytree(folders("unet") / "dense", tmp_path / "dense")
    weights = tmp_path / "dense" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EndorError):
        endor.pack_checkpoint(tmp_path / "dense", tmp_path / "out", threads=1)
    assert not list(tmp_path.glob("out*"))
    shutil.rmtree(tmp_path / "dense" / "text_encoder")
    shutil.rmtree(tmp_path / "dense" / "unet")
    shutil.rmtree(tmp_path / "dense" / "vae")
    with pytest.raises(CheckpointError, match="none of its folders holds a model"):
        endor.pack_checkpoint(tmp_path / "dense", tmp_path / "out", threads=1)


def test_links_that_lead_out_are_refused(folders, tmp_path):
    """Outputs are uploaded: a pipeline must not pick folders or files of this machine for them."""
    (tmp_path / "secret").write_text("secret")
    for name in ("vae", "tokenizer", "README.md"):
        source = tmp_path / f"with-{name}"
        shutil.copytree(folders("unet") / "dense", source)
        if name == "README.md":
            (source / name).unlink()
            (source / name).symlink_to(tmp_path / "secret")
        else:
            shutil.move(source / name, tmp_path / f"moved-{name}")
            (source / name).symlink_to(tmp_path / f"moved-{name}")
        with pytest.raises(CheckpointError, match="is a link to"):
            endor.pack_checkpoint(source, tmp_path / "out", threads=1)
        assert not list(tmp_path.glob("out*"))


def test_a_packed_pipeline_that_lost_a_part(folders, tmp_path):
    shutil.copytree(folders("unet") / "packed", tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed" / "scheduler")
    (tmp_path / "packed" / "tokenizer" / "tokenizer.json").write_text("{}")
    report = verify_checkpoint(tmp_path / "packed", against=folders("unet") / "dense")
    assert any(line.startswith("scheduler: is listed") for line in report.problems)
    assert any(line.startswith("tokenizer/tokenizer.json: differs") for line in report.problems)
    config = tmp_path / "packed" / "unet" / "config.json"
    members = json.loads(config.read_text())
    members["block_out_channels"] = [32, 64]
    config.write_text(json.dumps(members))
    with pytest.raises(EndorError, match="stored as"):
        diffusers.UNet2DConditionModel.from_pretrained(config.parent)


def test_a_killed_run_goes_on(folders, tmp_path, monkeypatch):
    from endor.checkpoint import composite

    pack, done = endor.pack_checkpoint, []

    def killed(path, *rest, **options):
        if done:
            raise KeyboardInterrupt
        done.append(path.name)
        return pack(path, *rest, **options)

    options = {"resume": False, "overwrite": False, "threads": 1}
    source = folders("sd3") / "dense"
    with pytest.raises(KeyboardInterrupt):
        composite.pack_composite(source, tmp_path / "out", killed, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputExistsError, match="--resume goes on"):
        endor.pack_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another source"):
        composite.pack_composite(
            folders("flux") / "dense", tmp_path / "out", pack, **options | {"resume": True}
        )
    made = []

    def counted(path, *rest, **more):
        made.append(path.name)
        return pack(path, *rest, **more)

    composite.pack_composite(source, tmp_path / "out", counted, **options | {"resume": True})
    assert done[0] not in made
    assert made
    assert verify_checkpoint(tmp_path / "out", against=source).ok
    assert names(tmp_path / "out") == names(folders("sd3") / "packed")


def test_sentence_transformers_of_the_old_layout(tmp_path):
    """The model in `0_Transformer`, the rest beside it."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path / "dense"
    transformers.BertModel(config).to(BF16).save_pretrained(path / "0_Transformer")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "modules.json").write_text(json.dumps([{"path": "0_Transformer"}]))
    endor.pack_checkpoint(path, tmp_path / "packed", threads=1)
    endor.unpack_checkpoint(tmp_path / "packed", tmp_path / "back", threads=1)
    assert names(tmp_path / "back") == names(path)
    assert (tmp_path / "packed" / "1_Pooling" / "config.json").exists()
    assert endor.load_model(tmp_path / "packed" / "0_Transformer").endor.weights


def test_a_diffusers_that_changed(folders, monkeypatch):
    """Never loaded without Endor, nor with random parameters."""
    from endor.hf import diffusion

    for name in ("AUTO_QUANTIZER_MAPPING", "DiffusersAutoQuantizer"):
        table = SimpleNamespace(**vars(diffusers.quantizers.auto))
        delattr(table, name)
        with pytest.raises(DependencyError, match=f"has no {name}"):
            diffusion.register(table)
    path = folders("flux") / "packed" / "transformer"
    kind = diffusion.EndorDiffusersQuantizer
    with monkeypatch.context() as patch:
        patch.setattr(kind, "maybe_update_loaded_keys", lambda self, keys, files: keys)
        with pytest.raises(DependencyError, match="which files it is about to load"):
            diffusers.FluxTransformer2DModel.from_pretrained(path)
