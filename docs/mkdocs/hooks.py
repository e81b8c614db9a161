"""Brings the repository's files that pages link to into the site.

On GitHub, `../examples/demo.py` is a link to a file. In the site it leads to `repository/examples/demo.py.html`, a
page with the same text. What such a page links to is brought in as well, to any depth.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
PICTURES = {".jpg", ".jpeg", ".png"}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)", flags=re.DOTALL | re.MULTILINE)


def in_repository(source: str) -> str:
    """A page's path in the repository, from its path in the site."""
    return source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"


def in_site(path: str) -> str:
    """The source in the site of a file or folder of the repository, and of files of `docs` themselves."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/README.md"
    return f"repository/{path}" if Path(path).suffix in {".md", *PICTURES} else f"repository/{path}.md"


def linked(text: str, source: str) -> dict[str, str]:
    """What a page links to in the repository outside of `docs`: paths by links."""
    folder = posixpath.dirname(in_repository(source))
    links = {match[2] for match in LINK.finditer(FENCE.sub("", text)) if "://" not in match[2]}
    paths = {link: posixpath.normpath(posixpath.join(folder, link)) for link in links}
    return {link: path for link, path in paths.items() if not path.startswith("..") and (ROOT / path).exists()}


def page_of(path: str) -> str:
    """Markdown that shows a file or the names in a folder."""
    file = ROOT / path
    if file.is_dir():
        if (file / "README.md").is_file():
            return (file / "README.md").read_text("utf-8")
        names = sorted(each.name + "/" * each.is_dir() for each in file.iterdir() if each.name[0] not in "._")
        lines = [f"- [{name}]({name})" if name.endswith(".py") else f"- {name}" for name in names]
        return "\n".join([f"# {path}", "", *lines])
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        return text
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{file.suffix[1:]}\n{text}\n````\n"


def on_files(files, config):
    waiting = [page for page in files.documentation_pages() if page.abs_src_path]
    while waiting:
        page = waiting.pop()
        for path in linked(page.content_string, page.src_uri).values():
            source = in_site(path)
            if files.get_file_from_path(source):
                continue
            if Path(path).suffix in PICTURES:
                files.append(File.generated(config, source, abs_src_path=str(ROOT / path)))
            else:
                files.append(File.generated(config, source, content=page_of(path)))
                waiting.append(files.get_file_from_path(source))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository become links of the site."""
    paths = linked(markdown, page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(match: re.Match) -> str:
        if match[2] not in paths:
            return match[0]
        return f"{match[1]}{posixpath.relpath(in_site(paths[match[2]]), folder)}{match[3] or ''}"

    fences = [match.span() for match in FENCE.finditer(markdown)]
    pieces, end = [], 0
    for start, stop in fences:
        pieces += [LINK.sub(rewrite, markdown[end:start]), markdown[start:stop]]
        end = stop
    return "".join([*pieces, LINK.sub(rewrite, markdown[end:])])


def on_page_content(html, page, config, files):
    r"""GitHub wants `\|` for a `|` in a table's code, where Python's Markdown keeps the backslash."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)
