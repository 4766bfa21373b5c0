"""Hooks of the site: pages from the root of the repository, and links that lead out of `docs/`.

README is the start page. The address of the repository, if `clip_prompt_peft/installing.py` names one, completes links
to files that are no pages; `setup.py` takes `absolute_links` from here for the package index.
"""

import logging
import posixpath
import re
import runpy
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).parents[1]
REPOSITORY = runpy.run_path(str(ROOT / "clip_prompt_peft" / "installing.py"))["REPOSITORY"]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FENCES = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINKS = re.compile(
    r"(?P<mark>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)|<img src=\"(?P<source>[^\"]+)\"(?P<rest>[^>]*)>"
)
ELSEWHERE = r"\"?(?:https?:)?//[^>]*>"
LOADED = re.compile(
    rf"<(?:script|img|iframe)[^>]*\ssrc={ELSEWHERE}|<link[^>]*(?:stylesheet|preconnect|icon)[^>]*\shref={ELSEWHERE}"
)
log = logging.getLogger("mkdocs.hooks.links")


def replace_links(text: str, address_of: Callable[[str, bool], str | None]) -> str:
    """
    Gives relative links and pictures of a Markdown text other addresses. Code blocks are left alone.

    Args:
        text (`str`):
            The text.
        address_of (`Callable[[str, bool], str | None]`):
            From the address in the text, and whether it is that of a picture, to the new one. Where it is `None`, the
            words of a link stay, and a picture goes.
    """

    def replaced(found: re.Match) -> str:
        is_picture = bool(found["source"] or found["mark"])
        old = found["source"] or found["target"]
        if re.match(r"[a-z]+:|#", old):
            return found[0]
        new = address_of(old, is_picture)
        if new is None:
            return "" if is_picture else found["text"]
        if found["source"]:
            return f'<img src="{new}"{found["rest"]}>'
        return f"{found['mark']}[{found['text']}]({new})"

    parts = FENCES.split(text)
    return "".join(part if part.startswith("```") else LINKS.sub(replaced, part) for part in parts)


def absolute_links(text: str, repository: str = REPOSITORY) -> str:
    """README as the package index shows it, which knows no files of the repository."""

    def address_of(path: str, is_picture: bool) -> str | None:
        return f"{repository}/{'raw' if is_picture else 'blob'}/main/{path}" if repository else None

    return replace_links(text, address_of)


def with_links_of_the_site(text: str, document: str) -> str:
    """A document of the repository, such as `docs/data.md`, with links to pages and to files of the repository."""

    def address_of(target: str, is_picture: bool) -> str | None:
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
        if not (ROOT / path).exists():
            log.warning("%s links to %r, which is not there", document, target)
        is_of_the_site = path.startswith("docs/") and not path.endswith(".py")
        page = PAGES.get(path) or (posixpath.relpath(path, "docs") if is_of_the_site else None)
        if page is None:
            return f"{REPOSITORY}/blob/main/{path}{mark}{anchor}" if REPOSITORY else None
        folder = posixpath.dirname(document).removeprefix("docs")
        return posixpath.relpath(page, folder.strip("/") or ".") + mark + anchor

    return replace_links(text, address_of)


def on_config(config):
    config.repo_url = REPOSITORY or None
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for document, page in PAGES.items():
        text = with_links_of_the_site((ROOT / document).read_text(encoding="utf-8"), document)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.abs_src_path is None:  # one of PAGES
        return markdown
    return with_links_of_the_site(markdown, f"docs/{page.file.src_uri}")


def on_post_page(output, page, config):
    for found in LOADED.findall(output):
        log.warning("%s loads something from elsewhere: %s", page.file.src_uri, found)
    return output
