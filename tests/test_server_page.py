"""Proves the scorer's page in a real browser: it fills itself with a real row, scores as one types, tells branches and what each field moves, and
marks a bad value.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import urllib.request

import pytest
from serve_process import started
from serving_data import artifact_of, trained_runs

aiohttp = pytest.importorskip("aiohttp")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""


async def use(socket: str, url: str, picture) -> dict:
    """Load, edit, write a bad value, repair it; what the page shows each time."""
    found = {}
    async with aiohttp.ClientSession() as session, session.ws_connect(socket, max_msg_size=0) as page:
        number = 0

        async def tell(method, **params):
            nonlocal number
            number += 1
            await page.send_json({"id": number, "method": method, "params": params})
            while (answer := json.loads((await page.receive()).data)).get("id") != number:
                pass
            assert "result" in answer, answer
            return answer["result"]

        async def value(script):
            answer = await tell("Runtime.evaluate", expression=script, returnByValue=True)
            return answer["result"].get("value")

        async def until(script):
            for _ in range(300):
                if await value(script):
                    return
                await asyncio.sleep(0.1)
            raise AssertionError(await value("document.body.innerText"))

        async def write(name, text):
            script = f"const i = document.querySelector('input[name={name}]'); i.value = {json.dumps(text)};"
            await value("{" + script + " i.dispatchEvent(new Event('input')) }")

        await tell("Emulation.setDeviceMetricsOverride", width=1240, height=1000, deviceScaleFactor=1, mobile=False)
        await tell("Page.navigate", url=url)
        await until("document.querySelectorAll('#moves tr').length > 3")
        fused = "document.getElementById('fused').textContent"
        found["loaded"] = await value(fused)
        found["branches"] = await value(
            "[...document.querySelectorAll('#branches tr')].map(row => row.cells[0].textContent)"
        )
        found["fields"] = await value("[...document.querySelectorAll('form input')].map(each => each.name)")
        found["sample"] = await value(
            "Object.fromEntries([...document.querySelectorAll('form input')].map(i => [i.name, i.value]))"
        )
        found["moves"] = await value("[...document.querySelectorAll('#moves tr')].map(row => row.cells[0].textContent)")
        picture.write_bytes(base64.b64decode((await tell("Page.captureScreenshot"))["data"]))
        await write("price", "900")
        await until(f"{fused} != {json.dumps(found['loaded'])}")
        found["edited"] = await value(fused)
        await write("user", "120")
        await until("!!document.querySelector('.bad')")
        found["bad"] = await value("document.querySelector('.bad').innerText")
        picture.with_suffix(".bad.png").write_bytes(base64.b64decode((await tell("Page.captureScreenshot"))["data"]))
        await write("user", found["sample"]["user"])
        await until("!document.querySelector('.bad') && document.getElementById('fault').textContent == ''")
        found["repaired"] = await value(fused)
    return found


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page(tmp_path, tmp_path_factory):
    artifact = artifact_of(trained_runs(tmp_path_factory.getbasetemp()), "row_wise", "fp32")
    sample = json.loads((artifact / "check.json").read_text())["sample"]
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={tmp_path}/user",
    ]
    with started(artifact) as (_, client):
        expected = client(
            "POST", "/score?branches=1", {"rows": [{name: each[0] for name, each in sample.items()}]}
        ).json
        with subprocess.Popen([*command, "about:blank"], stderr=subprocess.PIPE, text=True) as browser:
            try:
                line = next(line for line in browser.stderr if "DevTools listening" in line)
                port = line.partition("127.0.0.1:")[2].partition("/")[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                    socket = next(each for each in json.load(answer) if each["type"] == "page")["webSocketDebuggerUrl"]
                found = asyncio.run(use(socket, f"http://127.0.0.1:{client.port}/", tmp_path / "page.png"))
            finally:
                browser.terminate()
    assert found["loaded"] == f"{100 * expected['probability'][0]:.3f} %"
    assert found["branches"] == ["efgc", "cross", "deep"]
    assert set(found["fields"]) == set(sample) and "user" in found["moves"] and len(found["moves"]) == 15
    assert found["edited"] != found["loaded"] and found["repaired"] == found["edited"]
    assert "row 0, field 'user' = 120: wanted an id in [0, 120)" in found["bad"]
