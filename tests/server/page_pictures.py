"""Pictures of the page in docs/images: ``python -m tests.server.page_pictures``, with a Chromium.

The first answer in them is a text of ours that shows what the page draws; the second one, and its figures, are the bundled
checkpoint's, on the machine that takes the pictures.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mlx_mixtral.demo import checkpoint_path
from tests.server.browser import Page, chromium
from tests.server.conftest import running

PICTURES = Path(__file__).parents[2] / "docs" / "images"
MAX_PICTURE_BYTES = 150_000
ASKED = "How does a router choose its experts?"
SAMPLE = """A router scores **all experts** and keeps the `k` best:

```python
scores, chosen = top_k(x @ gate, k=2)
y = sum(s * experts[i](x) for s, i in zip(softmax(scores), chosen))
```

| | experts | active |
|---|---:|---:|
| 8x7B | 8 | 2 |
| 8x22B | 8 | 2 |
"""
OTHERS = ("Rivers of France", "A poem about the sea", "Explain this stack trace")


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as profile,
        running(checkpoint_path(), name="tiny-mixtral") as server,
        chromium(Path(profile)) as browser,
    ):
        page = Page(browser)
        page.show(1280, 860)
        page.open(f"{server.url}/")
        page.wait('byId("model").options.length > 0')
        for title in OTHERS:
            page.run(
                f"(() => {{ const made = makeConversation(); addNode(made, null, 'user', {title!r}); keep(made); }})()"
            )
        page.run(f"addNode(current, null, 'user', {ASKED!r})")
        page.run(f"addNode(current, current.leaf, 'assistant', {json.dumps(SAMPLE)}); keep(current); draw()")
        page.run("current.settings = { temperature: 0, max_tokens: 40 }")
        page.write("Und Gott sprach:")
        page.press("Enter")
        page.wait("running.size === 0 && current.nodes.length === 4")
        for name, width, height in (("page", 1280, 860), ("page-phone", 390, 844)):
            for theme in ("light", "dark"):
                page.show(width, height, is_phone=width < 500, scheme=theme)
                page.wait(f"document.documentElement.dataset.theme === '{theme}'")
                page.run("toEnd(); document.activeElement.blur(); new Promise((done) => setTimeout(done, 400))")
                picture = page.picture()
                assert len(picture) < MAX_PICTURE_BYTES, len(picture)
                (PICTURES / f"{name}-{theme}.png").write_bytes(picture)
                print(f"{name}-{theme}.png: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
