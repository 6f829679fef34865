"""Checkpoints: what is saved loads back exactly, and what is not the model's is refused with the file and the
key.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model

TRANSFORMER = {"_class_name": "QwenImage21Transformer2DModel", "patch_size": 1, "in_channels": 4,
               "out_channels": 4,
               "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "context_in_dim": 6,
               "mlp_ratio": 2,
               "axes_dims_rope": [4, 2, 2], "eps": 1e-6, "causal_condition": True}
VAE = {"_class_name": "AutoencoderKLQwenImage21", "base_dim": 2, "decoder_base_dim": 2, "z_dim": 4,
       "in_channels": 4,
       "out_channels": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1,
       "temperal_downsample": [False, True, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
KEY = "transformer_blocks.1.attn.to_q.weight"
TIME_CONV = "encoder.down_blocks.1.downsampler.time_conv.weight"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def random_state(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in network.state_dict().items()}


@pytest.fixture
def root(tmp_path):
    """A small directory in the hub layout, fp32 weights; processor, text encoder and scheduler are stand-ins.
    """
    root = tmp_path / "base"
    write_json(root / "model_index.json",
               {"_class_name": "QwenImage21Pipeline", "_sampling": {"size": [64, 64]}})
    for name, network, config in (("transformer", model.FlowTransformer(TRANSFORMER), TRANSFORMER),
                                  ("vae", model.VAE(VAE), VAE)):
        write_json(root / name / "config.json", config)
        save_file(random_state(network), root / name / WEIGHTS)
    write_json(root / "scheduler" / "scheduler_config.json", {"shift": 1.0})
    write_json(root / "rewards" / "reward.json", {})
    for name in ("processor", "text_encoder"):
        (root / name).mkdir()
    return root


def load(root, dtype=torch.float32):
    return model.materialise(model.new_transformer(root, dtype), root, "cpu")


def edit(path, change):
    """Rewrite a safetensors file after change(state)."""
    state = load_file(path)
    change(state)
    save_file(state, path)


# Loading and saving


def test_load_fills_the_modules_own_dtype(root):
    state = load_file(root / "transformer" / WEIGHTS)
    for dtype in (torch.float32, torch.bfloat16):
        network = load(root, dtype)
        assert network.state_dict().keys() == state.keys()
        for key, value in network.state_dict().items():
            assert value.dtype == dtype and torch.equal(value, state[key].to(dtype)), key


def test_save_then_load_is_bf16_rounding(root, tmp_path):
    network = load(root)
    model.save_model(tmp_path / "new", root, network, guidance=1.0, trained_on=[])
    for param, loaded in zip(network.parameters(), load(tmp_path / "new").parameters(), strict=True):
        assert torch.equal(loaded, param.bfloat16().float()) and not torch.equal(loaded, param)


def test_saved_directory_is_complete(root, tmp_path):
    """Everything frozen is linked to the base, the guidance scale is noted, nothing temporary stays."""
    model.save_model(tmp_path / "new", root, load(root), guidance=3.0, trained_on=["b"])
    new = model.find_model(tmp_path / "new")
    assert sorted(path.name for path in new.iterdir()) == [
        "model_index.json", "processor", "rewards", "scheduler", "text_encoder", "transformer", "vae"]
    assert sorted(path.name for path in (new / "transformer").iterdir()) == ["config.json", WEIGHTS]
    assert (new / "vae").readlink() == root / "vae"
    assert model.new_transformer(new, torch.float32).config == TRANSFORMER
    index = {"_class_name": "QwenImage21Pipeline",
             "_sampling": {"size": [64, 64], "guidance_scale": 3.0, "trained_on": ["b"]}}
    assert json.loads((new / "model_index.json").read_text()) == index
    assert not (tmp_path / "new.part").exists()
    assert len(load_file(new / "transformer" / WEIGHTS)) == len(load_file(root / "transformer" / WEIGHTS))
    model.load_vae(new, "cpu", torch.float32)


def test_save_replaces_an_older_save_and_keeps_the_base(root, tmp_path):
    network = load(root)
    model.save_model(tmp_path / "new", root, network, guidance=3.0, trained_on=[])
    write_json(tmp_path / "new.part" / "transformer" / "stale.json", {})  # as a killed save leaves it
    network.load_state_dict(random_state(network, seed=1))
    # base is itself a save
    model.save_model(tmp_path / "again", tmp_path / "new", network, guidance=1.0, trained_on=["a"])
    model.save_model(tmp_path / "new", root, network, guidance=1.0, trained_on=[])
    for directory in (tmp_path / "new", tmp_path / "again"):
        for param, loaded in zip(network.parameters(), load(directory).parameters(), strict=True):
            assert torch.equal(loaded, param.bfloat16().float())
    assert not (tmp_path / "new" / "transformer" / "stale.json").exists()
    assert (tmp_path / "again" / "vae").readlink() == root / "vae"  # outlives "new"
    assert (root / "vae" / WEIGHTS).is_file() and (root / "transformer" / WEIGHTS).is_file()


@pytest.mark.parametrize("shard_bytes", [9000, 1])
def test_sharded_save_loads_back(root, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(model, "SHARD_BYTES", shard_bytes)
    network = load(root)
    model.save_model(tmp_path / "new", root, network, guidance=1.0, trained_on=[])
    directory = tmp_path / "new" / "transformer"
    index = json.loads((directory / INDEX).read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for name in files:
        assert load_file(directory / name).keys() == {key
                                                      for key,
                                                      file in index["weight_map"].items() if file == name}
        sizes = [2 * value.numel() for value in load_file(directory / name).values()]
        assert sum(sizes) <= max(shard_bytes, sizes[0])
    assert index["metadata"]["total_size"] == 2 * sum(param.numel() for param in network.parameters())
    for param, loaded in zip(network.parameters(), load(tmp_path / "new").parameters(), strict=True):
        assert torch.equal(loaded, param.bfloat16().float())


# Refusals

CHANGES = {
    "missing": (lambda state: state.pop(KEY), ["transformer", "missing", KEY]),
    "unexpected": (lambda state: state.update(lora=torch.zeros(1)), ["transformer", "unexpected", "lora"]),
    "time_conv outside the VAE": (lambda state: state.update({TIME_CONV: torch.zeros(1)}),
                                  ["unexpected", TIME_CONV]),
    "rows": (lambda state: state.update({KEY: state[KEY][:8]}), [WEIGHTS, KEY, "[8, 16]", "[16, 16]"]),
    "flattened": (lambda state: state.update({KEY: state[KEY].flatten()}), [WEIGHTS, KEY, "[256]"]),
    "integers": (lambda state: state.update({KEY: state[KEY].to(torch.int32)}), [WEIGHTS, KEY, "I32"]),
    "fp8": (lambda state: state.update({KEY: state[KEY].to(torch.float8_e4m3fn)}), [WEIGHTS, KEY, "F8_E4M3"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_wrong_tensors(root, name):
    change, words = CHANGES[name]
    edit(root / "transformer" / WEIGHTS, change)
    with pytest.raises(model.UserError) as error:
        load(root)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_refuses_a_truncated_file(root, left):
    path = root / "transformer" / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:int(left * len(data)) if left == 0.5 else left])
    with pytest.raises(model.UserError, match="damaged or truncated") as error:
        load(root)
    assert str(path) in str(error.value)


def test_refuses_a_missing_file(root):
    (root / "transformer" / WEIGHTS).unlink()
    with pytest.raises(model.UserError, match=WEIGHTS):
        load(root)


@pytest.fixture
def sharded(root, tmp_path, monkeypatch):
    """The transformer/ directory of a model in three files or more."""
    monkeypatch.setattr(model, "SHARD_BYTES", 3000)
    model.save_model(tmp_path / "sharded", root, load(root), guidance=1.0, trained_on=[])
    return tmp_path / "sharded" / "transformer"


def test_refuses_a_missing_shard(sharded):
    name = json.loads((sharded / INDEX).read_text())["weight_map"][KEY]
    (sharded / name).unlink()
    with pytest.raises(model.UserError, match=name):
        load(sharded.parent)


def test_refuses_an_index_that_names_an_absent_tensor(sharded):
    name = json.loads((sharded / INDEX).read_text())["weight_map"][KEY]
    edit(sharded / name, lambda state: state.pop(KEY))
    with pytest.raises(model.UserError) as error:
        load(sharded.parent)
    assert name in str(error.value) and KEY in str(error.value)


def test_refuses_an_index_that_omits_a_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"][KEY]
    write_json(sharded / INDEX, index)
    with pytest.raises(model.UserError, match=f"missing.*{KEY}"):
        load(sharded.parent)


def test_vae_accepts_its_unused_convolutions_and_nothing_else(root):
    path = root / "vae" / WEIGHTS
    before = dict(model.load_vae(root, "cpu", torch.float32).named_parameters())
    extra = {f"{side}.{block}.{kind}sampler.time_conv.{name}": torch.ones(3, 5)
             for side, kind in (("encoder.down_blocks", "down"), ("decoder.up_blocks", "up"))
             for block in (0, 2) for name in ("weight", "bias")}
    edit(path, lambda state: state.update(extra))
    after = dict(model.load_vae(root, "cpu", torch.float32).named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(param.requires_grad for param in after.values())
    for key in ("decoder.time_conv.weight", "decoder.up_blocks.0.upsampler.time_mix.weight",
                TIME_CONV.replace("weight", "scale"), TIME_CONV + ".1"):
        edit(path, lambda state: state.update({key: torch.ones(1)}))
        with pytest.raises(model.UserError) as error:
            model.load_vae(root, "cpu", torch.float32)
        assert "1 unexpected" in str(error.value) and key in str(error.value)
        edit(path, lambda state: state.pop(key))
    edit(path, lambda state: state.pop("quant_conv.bias"))
    with pytest.raises(model.UserError, match="1 missing.*quant_conv.bias"):
        model.load_vae(root, "cpu", torch.float32)


def test_find_model_returns_the_directory(root):
    assert model.find_model(str(root)) == root


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", None])
def test_find_model_refuses_other_architectures(root, kind):
    write_json(root / "model_index.json", {"_class_name": kind})
    with pytest.raises(model.UserError, match=f"model_index.json.*{kind}.*expected 'QwenImage21Pipeline'"):
        model.find_model(root)


def test_find_model_names_what_is_not_there(root, monkeypatch):
    import huggingface_hub

    def unreachable(name, file=None):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(model.UserError, match="nobody/nothing.*no network"):
        model.find_model("nobody/nothing")
    (root / "model_index.json").unlink()
    with pytest.raises(model.UserError, match="model_index.json"):
        model.find_model(root)


def test_a_hub_repository_of_another_kind_is_refused_before_it_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: pytest.fail("it is fetched"))
    with pytest.raises(model.UserError, match="_class_name is .FluxPipeline., expected"):
        model.find_model("someone/flux")


@pytest.mark.parametrize("key, value",
                         [("patch_size", 2), ("causal_condition", False), ("_class_name", "Flux")])
def test_transformer_config_refuses(root, key, value):
    path = root / "transformer" / "config.json"
    write_json(path, TRANSFORMER | {key: value})
    with pytest.raises(model.UserError) as error:
        model.new_transformer(root, torch.float32)
    for word in (str(path), key, repr(value)):
        assert word in str(error.value)


def test_transformer_config_without_the_optional_keys(root):
    config = {key: value
              for key, value in TRANSFORMER.items() if key not in ("patch_size", "causal_condition", "eps")}
    write_json(root / "transformer" / "config.json", config)
    assert model.new_transformer(root, torch.float32).config == config
    load(root)


@pytest.mark.parametrize("text", ["", "{'patch_size': 1}", '{"patch_size": 1'])
@pytest.mark.parametrize("name, read", [("model_index.json", model.find_model),
                                        ("transformer/config.json",
                                         lambda root: model.new_transformer(root, torch.float32))])
def test_refuses_a_config_that_is_not_json(root, name, read, text):
    (root / name).write_text(text)
    with pytest.raises(model.UserError, match="not JSON") as error:
        read(root)
    assert str(root / name) in str(error.value)


# Prompt files


@pytest.mark.parametrize("line", [
    '"a"', "{}", '{"prompt": null}', '{"prompt": "a", "source": 5}', '{"prompt": "a", "category": ["b"]}',
    '{"prompt": "a", "task": 3}',
    "{"])
def test_a_bad_line_of_a_prompt_file_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(model.UserError, match="p.jsonl:3: want a JSON object"):
        model.load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("line, message", [
    (b'{"prompt": "a", "sources": ["x.png"]}', 'unknown key "sources"; is "source" meant'),
    (b'{"prompt": "a", "sorce": ["x.png"]}', 'unknown key "sorce"; is "source" meant'),
    (b'{"prompt": "  "}', "the prompt is empty"),
    (b'{"prompt": "a", "source": "gone.png"}', "there is no source image .*gone.png"),
    (b'{"prompt": "\xe9"}', "not UTF-8")])
def test_a_line_that_would_mean_something_else_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a", "answer": 3}\n' + line + b"\n")
    with pytest.raises(model.UserError, match=f"p.jsonl:2: {message}"):
        model.load_prompts(tmp_path / "p.jsonl")


def test_prompt_files_may_begin_with_a_mark_and_hold_null_sources(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\n\r\na blue \u00e9toile\r\n".encode())
    assert [request.prompt for request in model.load_prompts(tmp_path / "p.txt")] == ["a red circle",
                                                                                      "a blue \u00e9toile"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "source": null, "task": "poster"}\n')
    assert model.load_prompts(tmp_path / "p.jsonl") == [model.Request("a", task="poster")]


@pytest.mark.parametrize("part, key", [("transformer", "mlp_ratio"), ("vae", "dim_mult")])
def test_a_config_that_lacks_a_key_is_named(root, part, key):
    config = json.loads((root / part / "config.json").read_text())
    del config[key]
    write_json(root / part / "config.json", config)
    with pytest.raises(model.UserError, match=f"{part}/config.json: '{key}' is missing"):
        model.new_transformer(root, torch.float32) if part == "transformer" else model.load_vae(root, "cpu",
                                                                                                torch.float32)
