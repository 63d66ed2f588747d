//! Layers in, images out: every case builds tar streams by hand, unpacks them and reads the image back.

#[cfg(test)]
mod compared;
#[cfg(test)]
mod formats;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod layers;
#[cfg(test)]
mod real;
#[cfg(test)]
mod support;
