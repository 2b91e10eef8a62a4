//! Choices by their names on the command line.

/// Implements `ALL`, `name` and [`FromStr`](std::str::FromStr) for an enum: its choices, each with
/// its name.
macro_rules! named {
    ($choices:ident: $($choice:ident = $name:literal),+) => {
        impl $choices {
            /// All choices.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$choice),+];

            /// Its name on the command line.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$choice => $name,)+
                }
            }
        }

        /// Reads a name. The error lists all names.
        impl std::str::FromStr for $choices {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let known = Self::ALL.into_iter().find(|choice| choice.name() == text);
                known.ok_or_else(|| format!("there are {}", Self::ALL.map(Self::name).join(", ")))
            }
        }
    };
}
pub(crate) use named;
