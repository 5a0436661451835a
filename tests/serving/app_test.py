"""The server with a random model of a few thousand parameters: streams, changes, and every way to
leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from types import SimpleNamespace

import av
import pytest
from PIL import Image
from starlette.websockets import WebSocketDisconnect

from chameleon_jax.data.video import read_clip
from chameleon_jax.serving import app as serving
from chameleon_jax.serving import protocol
from chameleon_jax.serving.engine import AHEAD, MARGIN, Stream, Wish
from tests.serving.client import BEARER, ORIGIN, Server, Viewer


def test_pages_and_health(server):
    client = server.client
    page = client.get("/")
    assert page.status_code == 200 and "<canvas" in page.text
    assert "script-src" not in page.headers["content-security-policy"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers
    for name in (
        "main.js",
        "player.js",
        "film.js",
        "hold.js",
        "connection.js",
        "camera.js",
        "style.css",
    ):
        assert client.get(f"/{name}").status_code == 200
    assert client.get("/healthz").text == "ok"
    found = client.get("/readyz").json()
    assert found["model"] == "smoke"
    assert found["mechanisms"] == ["refresh", "withdraw", "disentangle", "anchor"]
    assert "chameleon_chunks_total" in client.get("/metrics").text
    assert client.get("/api/schema.json").json() == protocol.schema()
    assert client.get("/../app.py").status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_the_wardrobe_needs_the_token(server):
    assert server.client.get("/api/wardrobe").status_code == 401
    found = server.client.get("/api/wardrobe", headers=BEARER).json()
    assert {one["title"] for one in found} == {"person", "dress", "shirt", "coat"}
    assert all(one["thumbnail"].startswith("data:image/png;base64,") for one in found)


def test_uploads(server, pictures):
    data = (pictures / "coat.png").read_bytes()
    put = server.client.put
    assert put("/api/pictures/garment", content=data, headers=ORIGIN).status_code == 401
    assert put("/api/pictures/garment", content=data).status_code == 403  # neither page nor token
    evil = BEARER | {"origin": "http://evil.example"}
    assert put("/api/pictures/garment", content=data, headers=evil).status_code == 403
    done = put("/api/pictures/garment", content=data, headers=BEARER | ORIGIN)
    assert done.status_code == 200 and done.json()["kind"] == "garment"
    assert put("/api/pictures/garment", content=b"GIF89a", headers=BEARER).status_code == 415
    assert put("/api/pictures/shoe", content=data, headers=BEARER).status_code == 415
    large = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"\0" * 16_000_000)
    assert put("/api/pictures/garment", content=large, headers=BEARER).status_code == 413


def test_a_change_is_seen_from_the_frame_that_is_named(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        assert viewer.next()["type"] in ("session.ready", "video.start")
        for _ in range(3):
            viewer.until("video.chunk")
        viewer.say("session.interaction", id=1, garment=server.names["shirt"])
        assert viewer.until("session.interaction.queued")["id"] == 1
        applied = viewer.until("session.applied")
        chunk = viewer.until("video.chunk")
        assert applied["id"] == 1 and applied["first_frame"] == chunk["first_frame"]
        assert chunk["key"] and chunk["garment"] == server.names["shirt"]
        assert viewer.until("video.chunk")["garment"] == server.names["shirt"]
        viewer.say("session.stop")
        done = viewer.until("session.done", play=False)
    assert sorted(viewer.frames) == list(range(done["frames"]))
    film = server.client.get(done["recording"], headers=BEARER)
    clip = read_clip(film.content)
    assert len(clip.frames) == viewer.shown and clip.fps == 16
    manifest = server.client.get(
        done["recording"].replace("recording.mp4", "manifest.json"), headers=BEARER
    ).json()
    assert manifest["changes"][1]["frame"] == applied["first_frame"]
    assert manifest["seed"] == 1 and manifest["frames"] == viewer.shown
    assert server.client.get(done["recording"]).status_code == 401
    assert server.client.get("/api/streams/x/recording.mp4", headers=BEARER).status_code == 404


def test_nothing_is_made_ahead_for_one_who_does_not_look(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk", play=False)
        time.sleep(1.5)
        made = server.engine.figures["chunks"]
        time.sleep(0.5)
        assert server.engine.figures["chunks"] == made <= AHEAD
        viewer.until("video.chunk", play=False)
        viewer.play(1000)
        viewer.until("video.chunk")  # it goes on
        viewer.say("session.stop")
        viewer.until("session.done")


def test_what_was_not_shown_does_not_delay_a_change(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        for _ in range(2):
            chunk = viewer.until("video.chunk", play=False)  # made, and not shown
        viewer.say("session.interaction", id=4, garment=server.names["coat"])
        flush = viewer.until("session.flush", play=False)
        applied = viewer.until("session.applied", play=False)
        # The first boundary behind the shown frames, however much was made.
        assert applied["first_frame"] == flush["from_frame"] <= chunk["first_frame"]
        viewer.say("session.stop")
        viewer.until("session.done")


def test_a_recording_ends_with_what_was_shown(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        viewer.until("video.chunk", play=False)
        viewer.until("video.chunk", play=False)
        viewer.say("session.stop")
        done = viewer.until("session.done")
    assert done["frames"] > viewer.shown
    film = server.client.get(done["recording"], headers=BEARER)
    assert len(read_clip(film.content).frames) == viewer.shown


def film(server, **start):
    """A stream with three changes, the second one hard behind the first; and its manifest."""
    with server.connect() as socket:
        viewer = Viewer(socket, server).start(**start)
        viewer.until("video.chunk")
        viewer.until("video.chunk", play=False)
        viewer.say("session.interaction", id=1, garment=server.names["shirt"], prompt="she sits")
        viewer.until("session.applied", play=False)
        viewer.say("session.interaction", id=2, garment=server.names["coat"])
        viewer.until("session.applied", play=False)
        for _ in range(2):
            viewer.until("video.chunk")
        words = ["refresh", "disentangle"]
        viewer.say("session.interaction", id=3, person=server.names["person"], mechanisms=words)
        viewer.until("session.applied")
        viewer.until("video.chunk")
        viewer.say("session.stop")
        done = viewer.until("session.done", play=False)
    path = done["recording"].replace("recording.mp4", "manifest.json")
    return viewer, server.client.get(path, headers=BEARER).json()


def test_a_stream_is_made_again_from_its_manifest(server):
    first, manifest = film(server, codec="jpeg")
    assert manifest["frames"] == first.shown and not manifest["cut"]
    assert (manifest["decoder"], manifest["quantize"]) == ("vae", "none")
    start, *changes = manifest["changes"]
    assert [sorted(one) for one in changes] == [
        ["frame", "garment", "prompt"],
        ["frame", "garment"],
        ["frame", "mechanisms", "person"],
    ]
    # The change that was taken back before it was seen came with the one that followed.
    assert changes[0]["frame"] == changes[1]["frame"] < changes[2]["frame"]
    assert set(manifest["pictures"]) == {
        one[kind] for one in manifest["changes"] for kind in ("person", "garment") if kind in one
    }
    with server.connect() as socket:
        again = Viewer(socket, server).start(
            codec="jpeg", paused=True, seed=manifest["seed"], garment=start["garment"]
        )
        again.until("session.ready")
        for number, change in enumerate(changes):
            change = {"at": change["frame"]} | change
            del change["frame"]
            if "mechanisms" in change:
                change["mechanisms"] = [
                    word for word in protocol.MECHANISMS if change["mechanisms"][word]
                ]
            again.say("session.interaction", id=number, **change)
        again.say("session.resume")
        while again.shown < first.shown:
            again.until("video.chunk")
        again.say("session.interaction", id=9, at=3, garment=server.names["shirt"])
        assert "made already" in again.until("session.error")["message"]
        again.say("session.stop")
        again.until("session.done")
    for number in range(first.shown):
        assert first.frames[number] == again.frames[number], f"frame {number} differs"


def test_the_pictures_of_a_manifest_are_those_of_the_stream(server):
    _, manifest = film(server)
    for name, url in manifest["pictures"].items():
        kind, data = name.split("_")[0], base64.b64decode(url.partition(",")[2])
        done = server.client.put(f"/api/pictures/{kind}", content=data, headers=BEARER)
        assert done.json()["name"] == name  # so another server knows them, too


def test_who_chooses_now_has_another_film_in_mind(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start(paused=True)
        viewer.until("session.ready")
        viewer.say("session.interaction", id=1, at=40, garment=server.names["shirt"])
        viewer.say("session.interaction", id=2, garment=server.names["coat"])
        viewer.say("session.resume")
        while viewer.shown < 80:
            assert viewer.until("video.chunk")["garment"] == server.names["coat"]
        viewer.say("session.stop")
        viewer.until("session.done")


def test_a_stream_for_media_source_extensions(server):
    viewer, manifest = film(server, codec="mp4")
    kinds = [piece[4:8] for piece in viewer.pieces]
    assert kinds[0] == b"ftyp" and set(kinds[1:]) == {b"moof"}
    start = next(m for m in viewer.messages if m["type"] == "video.start")
    assert start["codec"].startswith("avc1.") and start["format"] == "mp4"
    chunk = next(m for m in viewer.messages if m["type"] == "video.chunk")
    with av.open(io.BytesIO(viewer.pieces[0])) as container:
        assert len(list(container.decode(video=0))) == chunk["frames"]
    name = next(m for m in viewer.messages if m["type"] == "session.ready")["session"]
    found = server.client.get(f"/api/streams/{name}/recording.mp4", headers=BEARER)
    assert len(read_clip(found.content).frames) == manifest["frames"]


def test_single_pictures_make_a_film_too(server):
    viewer, manifest = film(server, codec="jpeg")
    name = next(m for m in viewer.messages if m["type"] == "session.ready")["session"]
    found = server.client.get(f"/api/streams/{name}/recording.mp4", headers=BEARER)
    with av.open(io.BytesIO(found.content)) as container:
        assert container.streams.video[0].codec.name == "h264"
        assert len(list(container.decode(video=0))) == manifest["frames"] == viewer.shown


def test_films_are_kept_in_a_folder(pipeline, pictures, tmp_path):
    with Server(pipeline, pictures, record=tmp_path) as server:
        viewer, _ = film(server)
        with server.connect() as socket:  # runs when the server stops
            late = Viewer(socket, server).start()
            late.until("video.chunk")
            late.until("video.chunk")
    films = sorted(tmp_path.glob("*.mp4"))
    assert len(films) == 2 and len(list(tmp_path.iterdir())) == 4
    found = {len(read_clip(one.read_bytes()).frames) for one in films}
    assert viewer.shown in found and min(found) >= 9
    manifest = json.loads(films[0].with_suffix(".json").read_text())
    assert manifest["frames"] in found and manifest["changes"][0]["frame"] == 0


def test_a_picture_is_encoded_before_it_is_chosen(server, monkeypatch):
    server.wait_for(lambda: len(server.engine._encoded) == 4)
    encoded = []
    encode = server.engine.pipeline.media.encode_image

    def counted(pixels):
        encoded.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(server.engine.pipeline.media, "encode_image", counted)
    data = io.BytesIO()
    Image.new("RGB", (48, 64), "teal").save(data, "PNG")
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        assert encoded == []
        done = server.client.put(
            "/api/pictures/garment", content=data.getvalue(), headers=BEARER
        ).json()
        server.wait_for(lambda: done["name"] in server.engine._encoded)
        assert len(encoded) == 1
        viewer.say("session.interaction", id=1, garment=done["name"])
        viewer.until("session.applied")
        assert len(encoded) == 2  # the last frame, which is the new reference
        viewer.say("session.stop")
        viewer.until("session.done")


def test_the_last_of_many_changes_wins(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        names = [server.names[name] for name in ("shirt", "coat", "dress")]
        for number in range(60):
            viewer.say("session.interaction", id=number, garment=names[number % 3])
        viewer.say("session.interaction", id=60, prompt="she sits")
        while viewer.until("session.applied")["id"] != 60:
            pass
        assert viewer.until("video.chunk")["garment"] == names[59 % 3]
        viewer.say("session.stop")
        viewer.until("session.done")
        wrong = [m for m in viewer.messages if m["type"] == "session.error"]
        assert wrong == [] and server.engine.figures["failed"] == 0


def test_a_chunk_that_would_be_taken_back_is_called_off(server, monkeypatch):
    stream = server.engine.pipeline.stream
    make, made = stream.passes, []
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")

        def slow(*args):
            *_, start, _, _ = args
            if start:
                return make(*args)
            if len(made) < 6:  # six changes in a row come while a chunk is being made
                changed = {"id": len(made), "garment": server.names["shirt"], "hold": 0}
                socket.send_json({"type": "session.interaction", **changed})
                (active,) = server.live.active.values()
                server.wait_for(lambda: active.waits)
            made.append(args)
            return make(*args)

        monkeypatch.setattr(stream, "passes", slow)
        viewer.play(21)
        while viewer.until("session.applied", play=False)["id"] != 5:
            pass
        assert server.engine.figures["called_off"] >= 1
        # Never twice in a row: a storm of changes does not stop the stream.
        assert len([m for m in viewer.messages if m["type"] == "session.applied"]) >= 3
        viewer.say("session.stop")
        viewer.until("session.done")


def test_a_change_that_cannot_be_is_refused_and_the_stream_goes_on(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        viewer.say("session.interaction", id=1, garment="garment_none")
        assert viewer.until("session.error")["code"] == "refused"
        viewer.say("session.interaction", id=2, mechanisms=["withdraw"])
        assert "without refresh" in viewer.until("session.error")["message"]
        viewer.until("video.chunk")
        viewer.say("session.ping")
        viewer.until("session.pong")
        viewer.say("session.stop")
        viewer.until("session.done")


@pytest.mark.parametrize(
    ("hello", "code", "close"),
    [
        ({"token": "wrong"}, "token", 4401),
        ({"token": ""}, "token", 4401),
        ({"person": "x"}, "refused", 4400),
        ({"version": 7}, "message", 4400),
        ({"type": "session.ping", "version": None}, "message", 4400),
    ],
)
def test_who_is_sent_away(server, hello, code, close):
    with server.connect() as socket:
        socket.send_json(server.hello(**hello))
        assert json.loads(socket.receive_text())["code"] == code
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == close
    assert not server.live.active


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://testserver", None])
def test_pages_of_others_do_not_get_in(server, origin):
    headers = {} if origin is None else {"origin": origin}
    with pytest.raises(WebSocketDisconnect) as closed, server.connect(headers or {"x": "y"}):
        pass
    assert closed.value.code == 4403


def test_a_program_with_the_token_needs_no_origin(server):
    with server.connect(BEARER) as socket:
        viewer = Viewer(socket, server).start(token="")
        viewer.until("video.chunk")
        viewer.say("session.stop")
        viewer.until("session.done")


@pytest.mark.parametrize("stage", ["hello", "ready", "chunk", "change"])
def test_a_client_that_leaves_frees_its_place(pipeline, pictures, monkeypatch, stage):
    monkeypatch.setattr(serving, "RECONNECT", 0.1)
    with Server(pipeline, pictures) as server:
        for _ in range(3):
            with server.connect() as socket:
                viewer = Viewer(socket, server)
                if stage != "hello":
                    viewer.start()
                if stage in ("chunk", "change"):
                    viewer.until("video.chunk")
                if stage == "change":
                    viewer.say("session.interaction", id=1, garment=server.names["coat"])
            server.wait_for(lambda: not server.live.active and not server.engine.streams)
        with server.connect() as socket:
            viewer = Viewer(socket, server).start()
            viewer.until("video.chunk")
            viewer.say("session.stop")
            viewer.until("session.done")


def test_who_leaves_the_page_frees_the_place_at_once(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        begin = time.monotonic()
        socket.close(1001)
        server.wait_for(lambda: not server.live.active)
        assert time.monotonic() - begin < serving.RECONNECT / 2


def test_too_many_messages_end_a_stream(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        for _ in range(2 * serving.WORDS):
            viewer.say("session.played", frame=0)
        while viewer.next()["type"] != "session.error":
            pass
        assert viewer.messages[-1]["code"] == "rate"
    server.wait_for(lambda: not server.live.active)


def test_a_stream_for_a_server_that_stops_ends_at_once(pipeline, pictures):
    with Server(pipeline, pictures) as server:
        pass
    said = []
    stream = Stream("late", Wish(), 0, "jpeg", lambda *message: said.append(message[0]))
    server.engine.add(stream)
    assert said == ["session.done"] and server.engine.streams == 0


def test_a_client_that_was_cut_off_comes_back_to_its_stream(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        name = viewer.until("session.ready")["session"]
        for _ in range(3):
            viewer.until("video.chunk")
        shown = viewer.shown
    with server.connect() as socket:
        again = Viewer(socket, server).start(resume=name, hold=shown)
        again.shown = shown
        assert again.until("session.ready")["session"] == name
        first = again.until("video.chunk")
        assert first["key"] and first["first_frame"] == shown
        assert any(m["type"] == "video.start" for m in again.messages)
        again.say("session.stop")
        again.until("session.done")


def test_a_change_whose_chunk_was_lost_with_the_connection_is_made_once_and_told_again(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        name = viewer.until("session.ready")["session"]
        viewer.until("video.chunk")
        viewer.say("session.interaction", id=4, garment=server.names["shirt"])
        viewer.until("session.applied")
    shown, made = viewer.shown, server.engine.figures["changes"]
    with server.connect() as socket:
        again = Viewer(socket, server).start(resume=name, hold=shown)
        again.shown = shown
        applied = again.until("session.applied")
        first = again.until("video.chunk")
        assert applied["id"] == 4 and applied["first_frame"] == first["first_frame"] == shown
        assert first["garment"] == server.names["shirt"]
        # It cannot know that it was heard. The answer comes at once, and nothing is made again.
        again.say("session.interaction", id=4, garment=server.names["shirt"])
        again.asked = None
        again.until("session.interaction.queued")
        before = len(again.messages)
        again.until("video.chunk")
        again.until("video.chunk")
        kinds = {message["type"] for message in again.messages[before:]}
        assert kinds == {"video.chunk"}
        again.say("session.interaction", id=5, garment=server.names["dress"])
        assert again.until("session.applied")["id"] == 5
        again.say("session.stop")
        again.until("session.done")
    assert server.engine.figures["changes"] == made + 2  # once by coming back, and the last


def test_a_client_that_comes_back_may_pause(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        name = viewer.until("session.ready")["session"]
        viewer.until("video.chunk")
    with server.connect() as socket:
        again = Viewer(socket, server).start(resume=name, hold=viewer.shown, paused=True)
        again.shown = viewer.shown
        shown = again.until("video.chunk")["first_frame"]
        assert shown == viewer.shown  # the one that shows where it stands, and no more
        time.sleep(0.5)
        again.say("session.ping")
        assert again.next()["type"] == "session.pong"
        again.say("session.resume")
        again.until("video.chunk")
        again.say("session.stop")
        again.until("session.done")


def test_a_stream_that_is_gone_does_not_come_back(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        name = viewer.until("session.ready")["session"]
        viewer.say("session.stop")
        viewer.until("session.done")
    with server.connect() as socket:
        Viewer(socket, server).start(resume=name)
        assert json.loads(socket.receive_text())["code"] == "gone"


def test_others_wait_in_a_queue(pipeline, pictures):
    with Server(pipeline, pictures, sessions=1, queue=1) as server, server.connect() as one:
        first = Viewer(one, server).start()
        first.until("video.chunk")
        with server.connect() as two:
            second = Viewer(two, server).start()
            assert second.until("session.queued")["position"] == 1
            with server.connect() as three:
                Viewer(three, server).start()
                assert json.loads(three.receive_text())["code"] == "busy"
            first.say("session.stop")
            first.until("session.done")
            second.until("video.chunk")
            second.say("session.stop")
            second.until("session.done")


def test_who_leaves_the_queue_is_not_waited_for(pipeline, pictures):
    with Server(pipeline, pictures) as server, server.connect() as one:
        Viewer(one, server).start().until("video.chunk")
        with server.connect() as two:
            Viewer(two, server).start().until("session.queued")
            with server.connect() as three:
                third = Viewer(three, server).start()
                assert third.until("session.queued")["position"] == 2
                two.close()
                while third.until("session.queued")["position"] != 1:
                    pass
                assert len(server.live.waiting) == 1
                third.say("session.stop")
                assert third.until("session.done")["frames"] == 0
                server.wait_for(lambda: not server.live.waiting)


def test_one_who_says_nothing_is_sent_away(pipeline, pictures, monkeypatch):
    monkeypatch.setattr(serving, "IDLE", 0.5)
    with Server(pipeline, pictures) as server, server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk", play=False)
        while viewer.next()["type"] != "session.error":
            pass
        assert viewer.messages[-1]["code"] == "idle"
        with pytest.raises(WebSocketDisconnect) as closed:
            viewer.until("session.done")
        assert closed.value.code == 4408
        server.wait_for(lambda: not server.live.active)


def test_nothing_begins_while_the_server_stops(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        server.live.drain()
        assert server.client.get("/readyz").status_code == 503
        viewer.until("session.done")
    with server.connect() as socket:
        Viewer(socket, server).start()
        assert json.loads(socket.receive_text())["code"] == "stopping"


def test_two_streams_share_the_device_and_do_not_mix(pipeline, pictures):
    def run_film(server, seed, garment):
        with server.connect() as socket:
            viewer = Viewer(socket, server).start(seed=seed, garment=server.names[garment])
            while len(viewer.frames) < 30:
                viewer.until("video.chunk")
            viewer.say("session.stop")
            viewer.until("session.done")
        return [viewer.frames[number] for number in range(30)]

    with Server(pipeline, pictures, sessions=2) as server:
        alone = run_film(server, 1, "dress"), run_film(server, 2, "coat")
        found: dict[int, list] = {}

        def run(seed, garment):
            found[seed] = run_film(server, seed, garment)

        threads = [threading.Thread(target=run, args=args) for args in ((1, "dress"), (2, "coat"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found[1] == alone[0] and found[2] == alone[1] and found[1] != found[2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory at /secret/path"), "no memory left"),
        (ValueError("/secret/path"), "the stream failed (ValueError)"),
    ],
)
def test_an_error_ends_one_stream_and_no_other(server, monkeypatch, error, said):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        with monkeypatch.context() as patched:

            def fail(*args):
                raise error

            patched.setattr(server.engine.pipeline.stream, "passes", fail)
            viewer.play(1000)
            message = viewer.until("session.error")
            assert said in message["message"] and "secret" not in message["message"]
            viewer.until("session.done")
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        viewer.say("session.stop")
        viewer.until("session.done")
    assert server.engine.figures["failed"] == 1


def test_a_pause_stops_and_goes_on(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        viewer.say("session.pause")
        viewer.play(1000)
        time.sleep(1.0)
        made = server.engine.figures["chunks"]
        time.sleep(0.5)
        assert server.engine.figures["chunks"] == made
        viewer.say("session.resume")
        viewer.until("video.chunk")
        viewer.say("session.stop")
        viewer.until("session.done")


def test_a_client_without_hold_loses_at_most_what_it_did_not_tell(server):
    with server.connect() as socket:
        viewer = Viewer(socket, server).start()
        viewer.until("video.chunk")
        for _ in range(2):
            viewer.until("video.chunk", play=False)
        socket.send_json({"type": "session.interaction", "id": 1, "garment": server.names["coat"]})
        applied = viewer.until("session.applied", play=False)
        assert applied["first_frame"] >= viewer.shown + MARGIN
        viewer.say("session.stop")
        viewer.until("session.done")


def test_who_is_cut_off_at_any_moment_of_the_queue_keeps_no_place():
    class Silent:
        async def receive(self):
            await asyncio.Event().wait()

    class Free:
        engine = SimpleNamespace(wake=lambda: None)

        async def take(self, stream, tell):
            return True

    async def cut_off(turns):
        stream = Stream("s", Wish(), 0, "jpeg", lambda *message: None)
        task = asyncio.create_task(serving._seated(Silent(), Free(), stream, asyncio.Queue()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (end,) = await asyncio.gather(task, return_exceptions=True)
        return end is True, stream.stopped

    async def all_moments():
        return [await cut_off(turns) for turns in range(1, 12)]

    ends = asyncio.run(all_moments())
    assert ends[0] == (False, True) and ends[-1] == (True, False)
    assert all(seated != stopped for seated, stopped in ends)
