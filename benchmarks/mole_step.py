"""Times a training step of one feed-forward network: plain LoRA of PEFT, MoLE, and MoLE by a loop over its experts.

    python benchmarks/mole_step.py [--rounds 20] [--threads 2] [--quick] [--json]

A step is forward, backward to the network's input, and AdamW on the adapters, in float32. All networks have the same
frozen weights, and a mixture and its loop the same experts. They take turns in one process. Exits with 1 where
a claim fails.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from timing import Claim, measure, parse_arguments, report
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llava_family import LlavaMoleTextConfig, MoleMLP
from llava_family.llava_mole.layers_llava_mole import MoleExperts, balance_loss


FULL_SIZE = {"hidden_size": 2048, "intermediate_size": 5632}
QUICK_SIZE = {"hidden_size": 64, "intermediate_size": 128}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUM_TOKENS, RANK, ALPHA = 1024, 32, 64
NUM_EXPERTS = (2, 3, 4, 8)
PLAIN = "LoRA of PEFT"


def ours(num_experts: int, routing: str = "top1") -> str:
    return f"MoLE {routing}, {num_experts} experts"


def loop(num_experts: int, kind: str) -> str:
    return f"{kind} loop, {num_experts} experts"


CLAIMS = (
    *(Claim(ours(count), PLAIN, 1.05 if count <= 4 else 1.12) for count in NUM_EXPERTS),
    *(Claim(loop(count, "whole"), ours(count), None if count == 2 else 1.1, at_least=True) for count in NUM_EXPERTS),
    *(Claim(loop(count, "top1"), ours(count)) for count in NUM_EXPERTS),
    *(Claim(loop(count, "dense"), ours(count, "dense")) for count in NUM_EXPERTS),
)


class LoopOverExperts(nn.Module):
    """Experts one after the other, in three ways.

    `"whole"` is the definition, for any routing: every expert computes all tokens, and its output is weighted and
    added. The others are the released code's, written anew. `"top1"`: an expert's tokens are looked up, gathered,
    multiplied twice, scaled and assigned to their places. `"dense"`: outputs are stacked, weighted and summed.
    """

    def __init__(self, experts: MoleExperts, kind: str):
        super().__init__()
        self.scaling, self.kind = experts.scaling, kind
        self.weights_A = nn.ParameterList(weight.detach().clone() for weight in experts.weight_A)
        # As LoRA has it: (out_features, r)
        self.weights_B = nn.ParameterList(weight.detach().T.contiguous() for weight in experts.weight_B)

    def can_group(self, hidden_states: torch.Tensor) -> bool:
        return False

    def expert(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.weights_A[index].T @ self.weights_B[index].T * self.scaling

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, groups: None = None) -> torch.Tensor:
        experts = range(len(self.weights_A))
        if self.kind == "dense":
            outputs = torch.stack([self.expert(index, hidden_states) for index in experts], dim=2)
            return (outputs * weights[..., None]).sum(dim=2)
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], self.weights_B[0].shape[0])
        for index in experts:
            if self.kind == "whole":
                output = output + weights[..., index, None] * self.expert(index, hidden_states)
            else:
                own = torch.where(weights[..., index] > 0)
                output[own] = self.expert(index, hidden_states[own])
        return output


class Step(nn.Module):
    """A network with its optimizer and its loss."""

    def __init__(self, network: nn.Module, hidden_size: int):
        super().__init__()
        self.network = network
        self.hidden_states = torch.randn(
            1, NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # So small a rate that all steps do the same work
        self.optimizer = torch.optim.AdamW(trained, lr=1e-8)
        self.router_logits: torch.Tensor | None = None
        router = getattr(network, "mole_router", None)
        if router is not None:
            router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, router: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        self.router_logits = logits

    def forward(self) -> torch.Tensor:
        """The output of the network, behind whose step this returns."""
        self.hidden_states.grad = None
        output = self.network(self.hidden_states)
        loss = output.square().mean()
        if self.router_logits is not None:
            loss = loss + 0.01 * balance_loss((self.router_logits,))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.detach()


def build_steps(hidden_size: int, intermediate_size: int) -> dict[str, Step]:
    """The compared steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    dense = LlamaMLP(LlamaConfig(**sizes))
    dense.requires_grad_(False)
    frozen = dict(dense.state_dict())
    plain = LlamaMLP(LlamaConfig(**sizes))
    plain.load_state_dict(frozen, assign=True)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    networks: dict[str, nn.Module] = {PLAIN: get_peft_model(plain, config).base_model.model}
    for count in NUM_EXPERTS:
        for routing, kinds in (("top1", ("whole", "top1")), ("dense", ("dense",))):
            mixture = _mixture(count, routing, sizes, frozen, dense.act_fn)
            networks[ours(count, routing)] = mixture
            for kind in kinds:
                by_loop = _mixture(count, routing, sizes, frozen, dense.act_fn)
                by_loop.load_state_dict(mixture.state_dict())
                for name in PROJECTIONS:
                    layer = getattr(by_loop, name)
                    layer.mole_experts = LoopOverExperts(layer.mole_experts, kind)
                networks[loop(count, kind)] = by_loop
    return {name: Step(network, hidden_size) for name, network in networks.items()}


def _mixture(
    num_experts: int, routing: str, sizes: dict[str, int], frozen: dict[str, torch.Tensor], act_fn: nn.Module
) -> MoleMLP:
    config = LlavaMoleTextConfig(
        **sizes, num_experts=num_experts, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, routing=routing
    )
    with torch.device("meta"):
        mixture = MoleMLP(config, act_fn)
    adapters = {name: torch.empty(tensor.shape) for name, tensor in mixture.state_dict().items() if "mole_" in name}
    for tensor in adapters.values():
        nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
    mixture.load_state_dict({**frozen, **adapters}, assign=True)
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_("mole_" in name)
    return mixture


def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0], rounds=20, threads=2)
    size = QUICK_SIZE if arguments.quick else FULL_SIZE
    title = (
        f"Training step, hidden {size['hidden_size']}, inner {size['intermediate_size']}, rank {RANK}, "
        f"{NUM_TOKENS} tokens, float32"
    )
    return report(measure(build_steps(**size), arguments.rounds), CLAIMS, title, arguments)


if __name__ == "__main__":
    sys.exit(main())
