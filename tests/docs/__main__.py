"""Write the blocks of the documents that are the text of files anew: ``python -m tests.docs``."""

from __future__ import annotations

from tests.docs.blocks import PAGES, ROOT, refreshed


def main() -> None:
    """Refresh all pages, and name those that have changed."""
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        fresh = refreshed(text, name)
        if fresh != text:
            page.write_text(fresh)
            print(name)


if __name__ == "__main__":
    main()
