"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`.

vLLM runs these models by its backend for transformers' models. It looks a checkpoint's class up by name, as an
attribute of transformers or by the `auto_map` of a remote-code repository; that the Auto classes know the class is not
enough. vLLM itself is not imported: this works with every version that has the backend.
"""

from .auto import FAMILIES


def register_for_vllm() -> None:
    """Makes the heads of all families attributes of transformers. Calling it again changes nothing.

    That it was imported has registered them with the Auto classes already.

    Source: vLLM's entry point `vllm.general_plugins`.
    """
    import transformers

    for family in FAMILIES:
        head = family.load("modeling", family.head)
        if not hasattr(transformers, head.__name__):
            setattr(transformers, head.__name__, head)
