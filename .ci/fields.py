"""An extension of griffe: the API reference shows a `setting(default, group, help, ...)` as default and help."""

from typing import Any

from griffe import Attribute, Class, Docstring, ExprCall, Extension


class Fields(Extension):
    """Put the help of each setting of a dataclass into the arguments of its docstring."""

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        helps = {}
        for name, member in cls.members.items():
            if isinstance(member, Attribute) and isinstance(member.value, ExprCall):
                call = member.value
                if str(call.function) == "setting":
                    default, *more = call.arguments
                    member.value = default
                    if len(more) > 1 and isinstance(more[1], str):
                        helps[name] = more[1].strip("\"'")
        if helps and cls.docstring is not None:
            text = "\n".join(f"    {name}: {line}" for name, line in helps.items())
            whole = f"{cls.docstring.value}\n\nArgs:\n{text}\n"
            cls.docstring = Docstring(whole, lineno=cls.docstring.lineno, parent=cls, parser="google")
