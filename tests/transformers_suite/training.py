"""transformers' training test, on models that are made of several."""

from tests.test_training_mixin import TrainingTesterMixin
from transformers.testing_utils import slow


class CompositeTrainingTesterMixin(TrainingTesterMixin):
    """The mixin's batch has the tokens 1 to 19 and no image, and it asks the configuration for a vocabulary."""

    model_tester = None

    def _get_trainable_model_class(self):
        return self.all_model_classes[-1]

    def test_training_overfit(self):
        tester = self.model_tester
        tester.image_token_id = tester.text_config["vocab_size"] - 1
        make_config = tester.get_config

        def get_config():
            config = make_config()
            config.vocab_size = config.text_config.vocab_size
            return config

        tester.get_config = get_config
        super().test_training_overfit()


class VariantOfAFamily:
    """Of a family's further text models or routings: CI trains one, and the miniature has one."""

    pipeline_model_mapping: dict = {}

    @slow
    def test_training_overfit(self):
        super().test_training_overfit()
