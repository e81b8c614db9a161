"""transformers' own modelling tests (`tests.*` is theirs, see prepare.py) on LLaVA-UHD."""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from training import CompositeTrainingTesterMixin
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdModel
from llava_family.auto import register


register()
# The mixins tell models without a head by this table, which `.register` does not fill.
modeling_auto.MODEL_MAPPING_NAMES["llava_uhd"] = "LlavaUhdModel"


class LlavaUhdModelTester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 3
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.hidden_size = 32
        self.num_channels = 3
        self.image_token_id = 1
        self.pad_token_id = 0
        self.num_queries = 4
        self.is_training = True
        self.image_grids = [[0, 0], [0, 0], [2, 3]]
        self.seq_length = 7 + self.num_queries
        self.encoder_seq_length = self.seq_length
        self.text_config = {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": self.pad_token_id,
        }
        self.vision_config = {
            "hidden_size": 16,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            # The mixins expect a hidden state of every layer, and layers above this one are not built.
            "vision_feature_layer": -1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
        }

    def get_config(self):
        return LlavaUhdConfig(
            text_config=self.text_config,
            vision_config=self.vision_config,
            image_token_id=self.image_token_id,
            num_queries=self.num_queries,
            resampler_num_attention_heads=2,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        rows, columns = self.image_grids[-1]
        pixel_values = floats_tensor([self.batch_size * rows * columns, self.num_channels * 4])
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size - 2) + 2
        input_ids[:, : self.num_queries] = self.image_token_id
        return config, {
            "pixel_values": pixel_values,
            "image_grids": torch.tensor([self.image_grids] * self.batch_size, device=torch_device),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class LlavaUhdModelTest(
    ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, CompositeTrainingTesterMixin, unittest.TestCase
):
    all_model_classes = (LlavaUhdModel, LlavaUhdForConditionalGeneration)
    pipeline_model_mapping = dict.fromkeys(["image-text-to-text", "any-to-any"], LlavaUhdForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = LlavaUhdModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=LlavaUhdConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "num_queries"],
        )

    def test_reverse_loading_mapping(self):
        # The original's keys have the head's prefixes; a model without a head loads them by `base_model_prefix`.
        super().test_reverse_loading_mapping(skip_base_model=True)

    def test_config(self):
        self.config_tester.run_common_tests()
