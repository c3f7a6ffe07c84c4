"""``import moh_megatron.hf``: Transformers' Auto classes then open exported folders with the code of this package."""

from transformers import AutoConfig, AutoModelForCausalLM

from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM

AutoConfig.register(MoHConfig.model_type, MoHConfig)
AutoModelForCausalLM.register(MoHConfig, MoHForCausalLM)
# Whatever is saved then brings its code along, as what trust_remote_code opened does.
MoHConfig.register_for_auto_class()
MoHForCausalLM.register_for_auto_class("AutoModelForCausalLM")
