"""The application: routes over a room.

app = create_app(room, name="quickstart")
"""

from fastapi import FastAPI

from ship_ds.errors import UserError
from ship_ds.serving.errors import RequestError
from ship_ds.serving.room import Room


def create_app(room: Room, *, name: str = "base", api_key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        room: Where the model is; it has been started.
        name: What the bare base is called among the models.
        api_key: What clients have to send; None: nothing.

    Returns:
        An application that raises nothing at its clients: every error has OpenAI's body.
    """
    app = FastAPI(title="ship-ds", docs_url=None, redoc_url=None)
    app.state.room = room

    @app.exception_handler(RequestError)
    async def refuse(request: object, error: RequestError) -> object:
        return error.response()

    @app.exception_handler(UserError)
    async def refuse_input(request: object, error: UserError) -> object:
        return RequestError(400, str(error)).response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
