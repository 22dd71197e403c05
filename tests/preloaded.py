"""What the process that command lines are forked from has imported: nothing of it was run.

The catalogue and Hydra's store stay empty, as plugins and environment differ from test to test.
"""

import torch.distributed.tensor
import torch.utils.checkpoint  # noqa: F401
from accelerate import PartialState  # noqa: F401
from safetensors.torch import save_file  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: F401
from transformers.models.auto import modeling_auto  # noqa: F401

import luthier.commands.launch
import luthier.commands.train
import luthier.evaluation.evaluate  # noqa: F401
