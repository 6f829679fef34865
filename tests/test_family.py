"""Another model family under grpo.py: a network of one's own in the place of section 1 of model.py, with the
config and the prefix that section 3 asks for; encoders and VAE stay."""

import json

import pytest
import torch
from torch import nn

import model
from runs import ROOT, run_script
from safetensors.torch import load_file, save_file

TINY = ROOT / "tests" / "tiny" / "model"


class Linear(nn.Module):
    """v = A x + B c, where c is the mean of the prompt's embedding."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.text = nn.Linear(config["context_in_dim"], config["in_channels"], bias=False)
        channels = config["in_channels"]
        self.transformer_blocks = nn.ModuleList([nn.Linear(channels, channels, bias=False)])

    def prefix(self, prompts, grid, into=None):
        embeds = torch.stack([prompt.embeds.mean(0) for prompt in prompts])
        c = self.text(embeds)[:, None, None]                                                   # (P, 1, 1, C)
        if into is not None:
            for buffer in into[0]:
                buffer.copy_(c)
        rope = c.new_zeros(len(prompts), grid[0] * grid[1], c.shape[-1] // 2, 2)
        return model.Prefix(into or [(c, c)], rope, None, None)

    def velocity(self, x, t, prefix):
        (c, _), = prefix.kv
        return self.transformer_blocks[0](x) + model.select_prompts(c, prefix.index, len(x)).squeeze(1)

    def anchor(self, zero):
        return zero * self.text.weight.sum()


CONFIG = {"_class_name": "QwenImage21Transformer2DModel", "in_channels": 16, "context_in_dim": 96,
          "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "mlp_ratio": 1}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """The tiny checkpoint with a network of this family in the transformer's place."""
    monkeypatch.setattr(model, "FlowTransformer", Linear)
    monkeypatch.setattr(model, "prefix_tokens", lambda prompt: 1)
    root = tmp_path / "linear"
    (root / "transformer").mkdir(parents=True)
    for path in TINY.iterdir():
        if path.name != "transformer":
            (root / path.name).symlink_to(path)
    (root / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    weights = {name: 0.1 * value for name, value in Linear(CONFIG).state_dict().items()}
    save_file(weights, root / "transformer" / f"{model.WEIGHTS}.safetensors")
    return root


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_linear_velocity_learns_under_grpo(checkpoint, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("import numpy as np\n"
                      "def brightness(images, prompts, sources):\n"
                      "    return [np.asarray(image.convert('L')).mean() / 255 for image in images]\n")
    lines = run_script(tmp_path, "--model", checkpoint, "--prompts", ROOT / "tests/tiny/prompts.jsonl",
                       "--eval-prompts", ROOT / "tests/tiny/heldout.jsonl", "--reward",
                       f"brightness={reward}:brightness", "--steps", "6", "--name", "run", "--lr", "1e-3",
                       "--prompts-per-step", "4", "--kl-coef", "0", "--eval-images", "0", "--sample-every",
                       "0")
    rewards = [line["reward"]["brightness"] for line in lines]
    assert all(line["ratio_dev"][0] == 0 < line["ratio_dev"][1] for line in lines)
    assert rewards[-1] > rewards[0] + 0.1, rewards
    saved = load_file(next((tmp_path / "runs/run/model/transformer").glob("*.safetensors")))
    assert saved.keys() == Linear(CONFIG).state_dict().keys()
