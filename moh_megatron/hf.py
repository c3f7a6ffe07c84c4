"""Registers the exported model with Transformers.

After ``import moh_megatron.hf``, the Auto classes open exported folders with the code of this package.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM

AutoConfig.register(MoHConfig.model_type, MoHConfig)
AutoModelForCausalLM.register(MoHConfig, MoHForCausalLM)
# A model that save_pretrained writes then includes its code, as one opened with trust_remote_code does.
MoHConfig.register_for_auto_class()
MoHForCausalLM.register_for_auto_class("AutoModelForCausalLM")
