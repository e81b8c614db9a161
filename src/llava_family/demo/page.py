"""The page itself, made of gradio's components, and the server that shows it until Ctrl-C.

Source: no counterpart; components and server are gradio's.
"""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Read when gradio is imported: nothing is sent to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from .chat import Chat, read_image
from .panels import ROUTING_EMPTY, VIEWS_EMPTY


TITLES = {"llava_uhd": "LLaVA-UHD", "moe_llava": "MoE-LLaVA", "llava_mole": "LLaVA-MoLE"}
MAX_FILE_SIZE = "50mb"
# Of messages that say what went wrong: the model does not get them, nor the questions that they answer.
ERROR = "error"
# Of messages in place of an answer without text, which would be an empty bubble: the model gets the empty answer.
EMPTY = "empty"

CSS = """
.gradio-container > main { max-width: 90rem; margin: 0 auto; }
.left { position: sticky; top: 1rem; align-self: flex-start; }
.panel { margin-bottom: 1.5rem; }
.panel h2 { font-size: 1.15rem; font-weight: 600; margin: 0 0 0.2rem; }
.panel p { margin: 0 0 0.6rem; }
.panel .views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.panel figure { margin: 0 0 1rem; overflow-x: auto; background: white; color: #1a1a1a; border-radius: 8px;
  padding: 0.6rem; border: 1px solid var(--border-color-primary); }
.panel .views figure { margin: 0; }
.panel figcaption { color: inherit; font-weight: 600; margin-bottom: 0.3rem; }
.panel figure p { color: #444; margin: 0.4rem 0 0; }
.panel img { width: 100%; min-width: 30rem; height: auto; }
.panel img.view { width: 15rem; min-width: 0; image-rendering: pixelated; }
/* It would upload the picture to huggingface.co. */
#conversation button[aria-label="Share"],
#conversation div:has(> button[aria-label="Share"]:only-child) { display: none; }
"""

# Names for who does not see the page, where gradio gives none
NAMES = """() => {
    const name = () => {
        document.querySelector("#question textarea")?.setAttribute("aria-label", "Question");
        for (const image of document.querySelectorAll("#conversation img[alt=''], #question img[alt='']"))
            image.alt = decodeURIComponent(image.src.split("/").pop());
    };
    new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
    name();
}"""


def build_page(chat: Chat, model_name: str) -> gr.Blocks:
    """The page of a model.

    Args:
        chat (`Chat`): Which answers.
        model_name (`str`): What the page calls the model.

    Returns:
        `gradio.Blocks`: to be launched.
    """
    title = TITLES.get(chat.model.config.model_type, "llava-family")

    def answer(*inputs: Any) -> Iterator[tuple]:
        yield from answer_question(chat, *inputs)

    # Uploaded files are deleted within an hour after their day is over, and when the server ends.
    delete_cache = (3600, 24 * 3600)
    with gr.Blocks(
        title=f"{title}: {model_name}", analytics_enabled=False, fill_width=True, delete_cache=delete_cache
    ) as page:
        gr.Markdown(f"# {title}\nAdd one or several images and ask about them.\n\nModel: `{model_name}`")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340, elem_classes="left"):
                chatbot = gr.Chatbot(
                    label="Conversation",
                    elem_id="conversation",
                    height="58vh",
                    placeholder="Drop images into the field below and ask a question.",
                    # As it is: Markdown of an answer could make the browser fetch pictures from anywhere.
                    render_markdown=False,
                    buttons=["copy"],
                    allow_file_downloads=False,
                    feedback_options=None,
                )
                question = gr.MultimodalTextbox(
                    label="Question and images",
                    elem_id="question",
                    placeholder="Ask about the images; Enter sends",
                    file_count="multiple",
                    file_types=["image"],
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
                with gr.Accordion("Decoding", open=False):
                    max_new_tokens = gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens")
                    temperature = gr.Slider(
                        0, 2, value=0, step=0.1, label="Temperature", info="0 is greedy: the same answer each time."
                    )
            with gr.Column(scale=6, min_width=340):
                views = gr.HTML(VIEWS_EMPTY)
                routing = gr.HTML(ROUTING_EMPTY, visible=chat.recorder is not None)

        # One queue for all who ask: the recording of one answer must not get passes of another one.
        answering = {
            "fn": answer,
            "inputs": [chatbot, max_new_tokens, temperature],
            "outputs": [chatbot, views, routing],
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": [chatbot],
        }
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        sent = question.submit(add_question, [question, chatbot], [question, chatbot], **quick).success(**answering)
        again = chatbot.retry(drop_answer, [chatbot], [question, chatbot], **quick).success(**answering)
        for event in (sent, again):
            event.then(end_answer, None, [question], **quick)
        question.stop(end_answer, None, [question], cancels=[sent, again], **quick)
        chatbot.clear(end_conversation, None, [question, views, routing], cancels=[sent, again], **quick)
    return page


def answer_question(
    chat: Chat, history: list[dict[str, Any]], max_new_tokens: float, temperature: float
) -> Iterator[tuple]:
    """Streams the conversation with the answer to its last question, and the two panels.

    What goes wrong, as with a bad image or without memory, becomes the answer, and the page goes on. An answer without
    text is said to be one.

    Args:
        chat (`Chat`): Which answers.
        history (`list[dict]`): What a `gradio.Chatbot` gives.
        max_new_tokens (`float`): Longest answer in tokens, a whole number.
        temperature (`float`): Of sampling; 0 decodes greedily.
    """
    try:
        for update in chat.answer(read_conversation(history), int(max_new_tokens), temperature):
            panels = (gr.skip() if panel is None else panel for panel in (update.views, update.routing))
            yield [*history, _answer(update.text)], *panels
        if not update.text:
            yield [*history, _answer("(an answer without text)", EMPTY)], gr.skip(), gr.skip()
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        yield [*history, _answer(f"Error: {text}", ERROR)], gr.skip(), ROUTING_EMPTY


def _answer(text: str, kind: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "metadata": {"id": kind} if kind else None}


def add_question(question: dict[str, Any], history: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """Puts what was typed and dropped into the conversation; the field is empty then, with a button that stops."""
    if not question["text"].strip():
        raise gr.Error("Type a question.", print_exception=False)
    files = [{"path": file, "alt_text": Path(file).name} for file in question["files"]]
    message = {"role": "user", "content": [*files, question["text"].strip()]}
    return _answering(value=None), [*history, message]


def drop_answer(history: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """The conversation up to its last question."""
    while history and history[-1]["role"] != "user":
        history = history[:-1]
    return _answering(), history


def _answering(**changes: Any) -> Any:
    return gr.MultimodalTextbox(submit_btn=False, stop_btn=True, interactive=False, **changes)


def end_answer() -> Any:
    """The field is ready for the next question."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, interactive=True)


def end_conversation() -> tuple:
    """The field and the panels as they were before the first question."""
    return end_answer(), VIEWS_EMPTY, ROUTING_EMPTY


def read_conversation(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a chat template, with the images of the uploaded files.

    Questions that were answered by an error are left out, with their images. An answer without text is empty.

    Args:
        history (`list[dict]`): What a `gradio.Chatbot` gives: each message's content is a list of files and texts.

    Returns:
        `list[dict]`: Messages of roles and contents, with PIL images.

    Raises:
        ValueError: if a file is no image.
    """
    messages: list[dict[str, Any]] = []
    for message in history:
        kind = (message.get("metadata") or {}).get("id")
        if kind == ERROR:
            messages.pop()
            continue
        content = [
            {"type": "image", "image": item["file"]["path"]}
            if item["type"] == "file"
            else {"type": "text", "text": "" if kind == EMPTY else item["text"]}
            for item in message["content"]
        ]
        messages.append({"role": message["role"], "content": content})
    for message in messages:
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = read_image(item["image"])
    return messages


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Args:
        host (`str`): Address to listen at.
        port (`int`): Port to listen at.

    Returns:
        `int`: The port, which nobody listens at now.

    Raises:
        ValueError: if it cannot be had.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise ValueError(
            f"Port {port} of {host!r} cannot be used: {error.strerror or error}. Choose another one with --port, or "
            "--port 0 for any that is free."
        ) from error


def serve(page: gr.Blocks, chat: Chat, host: str, port: int, report: Any = print) -> None:
    """Shows the page until Ctrl-C.

    Args:
        page (`gradio.Blocks`): Of [`build_page`].
        chat (`Chat`): Whose answer is stopped behind it.
        host (`str`): Address to listen at.
        port (`int`): Port to listen at.
        report (`Callable`, *optional*): Gets the page's address.
    """
    theme = gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],  # no font is fetched
        font_mono=["ui-monospace", "monospace"],
    ).set(
        background_fill_primary="*neutral_50",  # which `set` forgets
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        input_placeholder_color="*neutral_500",
    )
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        js=NAMES,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    try:
        report(f"Open {page.local_url} in a browser; Ctrl-C ends.")
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        chat.stop()
        page.close(verbose=False)


__all__ = ["build_page", "check_port", "read_conversation", "serve"]
